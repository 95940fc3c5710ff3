"""The report as one HTML page that asks nothing of the network: pictures, styles and charts lie inside it."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from PIL import Image

from obsdiff import charts, wording
from obsdiff.evaluation import Evaluation, ImagePair, PromptResult
from obsdiff.measurements import NotMeasured, Report
from obsdiff.metrics import Picture
from obsdiff.templates import FOLDER, environment

PIXELATED_BELOW: Final = 200
"""Pictures with a longer side below this are enlarged pixel by pixel, so that what is compared can be seen."""

LARGEST_SIDE: Final = 512
JPEG_ABOVE: Final = 128


@dataclass(frozen=True, kw_only=True)
class ShownPair:
    """A picture pair as the page shows it; the pictures are data URIs."""

    prompt: str
    seed: int
    dense: str
    pruned: str
    difference: str
    pixelated: bool
    result: PromptResult


def render(report: Report, images: Sequence[ImagePair]) -> str:
    """The page.

    Args:
        report: everything that is said.
        images: the picture pairs, those of the report's evaluation or its first ones.
    """
    templates = environment(escape=True)
    templates.globals |= {
        name: getattr(wording, name)
        for name in ("size", "seconds", "milliseconds", "percent", "small", "speedup", "points", "proven")
    }
    return templates.get_template("report.html.j2").render(
        report=report,
        # Our own stylesheet, written for this page: nothing of the user's is in it.
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        headline=wording.headline(report),
        summary=wording.summary(report),
        notes=wording.notes(report),
        absences=wording.absences(report),
        engine_sparsity=wording.engine_sparsity(report),
        recipe=json.dumps(dict(report.recipe), indent=2, ensure_ascii=False, default=str),
        layer_chart=_layer_chart(report),
        **_pictures(report.evaluation, images),
    )


def _pictures(evaluation: Evaluation | NotMeasured, images: Sequence[ImagePair]) -> Mapping[str, Any]:
    empty: dict[str, Any] = {"pairs": [], "agreement": None, "velocity_chart": None, "amplified": 1, "shrunk": False}
    empty |= {"block_chart": None, "block_field": None, "field_range": None, "sweep": None}
    if isinstance(evaluation, NotMeasured):
        return empty | {"no_pictures": evaluation.why}
    results = {(result.prompt, result.seed): result for result in evaluation.per_prompt}
    factor = _amplification(images)
    chart = charts.line(evaluation.velocity_error_per_step, x="step", y="relative velocity error")
    return {
        "pairs": [_shown(pair, results[pair.prompt, pair.seed], factor) for pair in images],
        "agreement": _agreement(evaluation.per_prompt),
        "velocity_chart": Markup(chart),
        "field_range": _range(evaluation.block_errors_per_step),
        "sweep": evaluation.guidance,
        "block_chart": Markup(charts.lines({"": evaluation.block_errors}, x="block", y="relative error", first=0)),
        "block_field": Markup(
            charts.heat(evaluation.block_errors_per_step, labels=evaluation.blocks, x="step", y="block")
        ),
        "amplified": factor,
        "shrunk": any(max(pair.dense.shape[:2]) > LARGEST_SIDE for pair in images),
        "no_pictures": "none were kept",
    }


def _range(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    values = [value for row in rows for value in row]
    return min(values), max(values)


def _shown(pair: ImagePair, result: PromptResult, factor: int) -> ShownPair:
    difference = np.abs(pair.dense.astype(np.int16) - pair.pruned.astype(np.int16)) * factor
    return ShownPair(
        prompt=pair.prompt,
        seed=pair.seed,
        dense=data_uri(pair.dense),
        pruned=data_uri(pair.pruned),
        difference=data_uri(difference.clip(0, 255).astype(np.uint8)),
        pixelated=max(pair.dense.shape[:2]) < PIXELATED_BELOW,
        result=result,
    )


def _amplification(images: Sequence[ImagePair]) -> int:
    """1, 2, 4 or 8: as bright as the differences allow, the same for all pairs, so that they can be compared."""
    if not images:
        return 1
    tops = [np.quantile(np.abs(pair.dense.astype(np.int16) - pair.pruned), 0.99) for pair in images]
    top = float(max(tops))
    return next((factor for factor in (8, 4, 2) if top * factor <= 255), 1)


def data_uri(picture: Picture) -> str:
    """A picture as a data URI: small ones as PNG, to the last bit, large ones reduced to 512 pixels, as JPEG."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    kind = "PNG" if max(picture.shape[:2]) <= JPEG_ABOVE else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **({"quality": 92} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _agreement(results: Sequence[PromptResult]) -> dict[str, int] | None:
    judged = [(result.dense_obeys, result.pruned_obeys) for result in results if result.dense_obeys is not None]
    if not judged:
        return None
    return {
        "total": len(judged),
        "both": judged.count((True, True)),
        "dense": judged.count((True, False)),
        "pruned": judged.count((False, True)),
        "neither": judged.count((False, False)),
    }


def _layer_chart(report: Report) -> Markup | None:
    layers = [(layer.name, layer.loss) for layer in report.layers if layer.loss is not None]
    if not layers:
        return None
    chart = charts.dots(
        [loss for _, loss in layers],
        labels=[name for name, _ in layers],
        groups=[_block(name) for name, _ in layers],
        x="block",
        y="loss",
    )
    return Markup(chart)


def _block(linear: str) -> str:
    """The block in a linear's name: "3" of "transformer_blocks.3.attn.to_q", "down 1.0.2" of a UNet's."""
    match = re.match(r"(.*?blocks\.\d+)\b", linear)
    nested = re.match(r"(down|mid|up)_blocks?((?:\.\d+)?)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.", linear)
    if nested is not None:
        return f"{nested[1]}{nested[2].replace('.', ' ')}.{nested[3]}.{nested[4]}"
    return match[1].rpartition(".")[2] if match is not None else linear.partition(".")[0]
