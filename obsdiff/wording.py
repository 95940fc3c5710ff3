"""Numbers and findings in words, the same ones on the terminal, on the page and on the card."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from obsdiff.evaluation import Evaluation, Share
from obsdiff.guidance import GuidanceSweep
from obsdiff.judges import OBEDIENCE
from obsdiff.measurements import BuiltEngine, LatencyPair, NotMeasured, Report
from obsdiff.sparsity import parse
from obsdiff.spread import Spread
from obsdiff_export.quantities import count as count
from obsdiff_export.quantities import milliseconds as milliseconds
from obsdiff_export.quantities import percent as percent
from obsdiff_export.quantities import seconds as seconds
from obsdiff_export.quantities import size as size
from obsdiff_export.quantities import small as small

ABSENT = "not measured"
NO_RATIO = ""

FIGURES: Final = {
    "velocity_error": "velocity",
    "block_error": "last block",
    "latents_relative": "latents",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fid_clip.pruned": "FID, CLIP",
    "pruned_obedience.share": "obeyed",
    "guidance.pruned_best.pruned": "retuned",
}
"""The figures of an evaluation that are shown side by side, of those that were measured, with their headings."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the summary; `ratio` is pruned / dense, so that less than 1 is smaller or faster."""

    label: str
    dense: str
    pruned: str
    ratio: str = NO_RATIO


def obedience(share: Share) -> str:
    """45 of 48 (93.8 %)."""
    return f"{share.obeyed} of {share.prompts} ({percent(share.share)})"


def interval(share: Share) -> str:
    return f"95 % interval {100 * share.low:.0f} to {100 * share.high:.0f} %"


def points(sweep: GuidanceSweep, score: float) -> str:
    """A score in the units of the sweep's judge."""
    return percent(score) if sweep.judge == OBEDIENCE else f"{score:.4g}"


def runs(
    folders: Sequence[Path], reports: Sequence[Report], spread: Mapping[str, Spread]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Headings, and rows of as many cells after their label: the dense model, the runs, and what is over them."""
    evaluations = [None if isinstance(found.evaluation, NotMeasured) else found.evaluation for found in reports]
    measured = [evaluation for evaluation in evaluations if evaluation is not None]
    figures = [{} if evaluation is None else evaluation.figures() for evaluation in evaluations]
    judged = dict.fromkeys(name for evaluation in measured for name in evaluation.scores)
    headings = {
        name: heading
        for name, heading in (FIGURES | {f"scores.{name}.pruned": name for name in judged}).items()
        if any(run.get(name) is not None for run in figures)
    }
    shares = {"pruned_obedience.share"}
    if any(each.guidance is not None and each.guidance.judge == OBEDIENCE for each in measured):
        shares.add("guidance.pruned_best.pruned")

    def row(label: str, values: Mapping[str, float | None], absent: str = "") -> tuple[str, ...]:
        return (label, *(_figure(values.get(name), name in shares, absent) for name in headings))

    dense = {name: figures[0].get(name.replace("pruned", "dense")) for name in headings if "pruned" in name}
    rows = [row("dense", dense)] if dense else []
    rows += [row(str(folder), run, ABSENT) for folder, run in zip(folders, figures, strict=True)]
    if spread:
        for part in ("mean", "std", "least", "most"):
            rows.append(row(part, {name: getattr(of, part) for name, of in spread.items()}))
    return tuple(headings.values()), tuple(rows)


def _figure(value: float | None, share: bool, absent: str) -> str:
    if value is None:
        return absent
    if math.isinf(value):
        return "identical"
    return percent(value) if share else f"{value:#.3g}"


def speedup(latency: LatencyPair) -> str:
    """1.02x the dense speed, 95 % interval 0.99 to 1.05."""
    found = latency.comparison
    said = f"{found.speedup:.2f}x the dense speed"
    if found.low is None or found.high is None:
        return said
    return f"{said}, 95 % interval {found.low:.2f} to {found.high:.2f}"


def summary(report: Report) -> tuple[Row, ...]:
    """The table of the summary: size, speed, quality."""
    rows = [
        _counts("parameters of the denoiser", report.dense.parameters, report.pruned.parameters),
        _counts("of these not zero", report.dense.nonzero, report.pruned.nonzero),
        _counts("MACs of a call, zeros counted", report.dense.macs, report.pruned.macs),
        _counts("denoiser on disk", report.dense.bytes_on_disk, report.pruned.bytes_on_disk, in_bytes=True),
    ]
    if isinstance(report.latency, NotMeasured):
        rows.append(Row(label="latency", dense=ABSENT, pruned=ABSENT))
    else:
        rows += [_latency(latency) for latency in report.latency]
    if isinstance(report.evaluation, NotMeasured):
        return (*rows, Row(label="quality", dense=ABSENT, pruned=ABSENT))
    return (*rows, *_quality(report.evaluation))


def headline(report: Report) -> tuple[str, ...]:
    """What was done, is it faster, is it good: one plain sentence or two for each."""
    return (_done(report), _speed(report), _goodness(report))


def proven(engine: BuiltEngine) -> str:
    """140 active, 56 not chosen: the linears of an engine by what is proven of their kernels."""
    return ", ".join(f"{linears} {verdict}" for verdict, linears in engine.verdicts.items()) or "none looked at"


def engine_sparsity(report: Report) -> tuple[str, ...]:
    """What is known of sparse kernels in the engines, each sentence once, behind the names it is true of."""
    said: dict[str, list[str]] = {}
    for engine in () if isinstance(report.engines, NotMeasured) else report.engines:
        for sentence in filter(None, (engine.sparsity, _sentence(engine.choice))):
            said.setdefault(sentence, []).append(engine.component)
    return tuple(f"{', '.join(dict.fromkeys(names))}: {sentence}" for sentence, names in said.items())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def notes(report: Report) -> tuple[str, ...]:
    """The run's own notes, then what its numbers call for."""
    said = list(report.notes)
    engines = () if isinstance(report.engines, NotMeasured) else report.engines
    if has_pattern(report.sparsity) and any("rtx" in engine.backend.lower() for engine in engines):
        said.append(
            "TensorRT-RTX ignores the sparse-weights flag: these engines multiply the zeros. Sparse kernels need"
            " TensorRT on the GPU that will run them: obsdiff build."
        )
    if not isinstance(report.evaluation, NotMeasured):
        said += _cautions(report.evaluation)
    reasons = Counter(layer.reason for layer in report.layers if layer.pattern == "dense" and layer.reason)
    for reason, linears in reasons.items():
        said.append(f"{linears} {'linear' if linears == 1 else 'linears'} stayed dense: {reason}.")
    return tuple(said)


def _cautions(evaluation: Evaluation) -> list[str]:
    """What the numbers of an evaluation must not be taken for."""
    said, prompts = [], len(evaluation.per_prompt)
    if evaluation.fid_clip is not None:
        said.append(
            f"FID was taken over {prompts} pictures of each model: below some thousands most of it is the bias of a"
            " small sample, so compare pruned with dense only."
        )
    if evaluation.guidance is not None:
        said.append(
            f"The best guidance was chosen on the same {prompts} prompts it is reported on, for both models alike."
        )
    return said


def absences(report: Report) -> tuple[str, ...]:
    """One line for every number that is absent, with the reason."""
    named: Sequence[tuple[str, object]] = (
        ("MACs", report.pruned.macs),
        ("bytes on disk", report.pruned.bytes_on_disk),
        ("ONNX graphs", report.components),
        ("engines", report.engines),
        ("latency", report.latency),
        ("quality", report.evaluation),
    )
    return tuple(f"{name}: not measured, {value.why}" for name, value in named if isinstance(value, NotMeasured))


def has_pattern(sparsity: str) -> bool:
    """Whether the sparsity leaves zeros in the stored weights (N:M or unstructured), beside what is cut out."""
    return parse(sparsity).pattern is not None


def _counts(label: str, dense: int | NotMeasured, pruned: int | NotMeasured, *, in_bytes: bool = False) -> Row:
    show = size if in_bytes else count
    if isinstance(dense, NotMeasured) or isinstance(pruned, NotMeasured):
        before = ABSENT if isinstance(dense, NotMeasured) else show(dense)
        return Row(label=label, dense=before, pruned=ABSENT if isinstance(pruned, NotMeasured) else show(pruned))
    ratio = f"{pruned / dense:.3f}" if dense else NO_RATIO
    return Row(label=label, dense=show(dense), pruned=show(pruned), ratio=ratio)


def _latency(latency: LatencyPair) -> Row:
    return Row(
        label=f"{latency.what}, median",
        dense=milliseconds(latency.dense.p50_ms),
        pruned=milliseconds(latency.pruned.p50_ms),
        ratio=f"{1 / latency.comparison.speedup:.3f}, {latency.verdict}",
    )


def _quality(evaluation: Evaluation) -> list[Row]:
    rows = []
    if evaluation.dense_obedience is not None and evaluation.pruned_obedience is not None:
        dense, pruned = evaluation.dense_obedience, evaluation.pruned_obedience
        change = f"{100 * (pruned.share - dense.share):+.1f} points"
        rows.append(Row(label="prompts obeyed", dense=obedience(dense), pruned=obedience(pruned), ratio=change))
    psnr = "identical" if evaluation.psnr_db is None else f"{evaluation.psnr_db:.1f} dB"
    rows += [
        Row(label="velocity error, relative", dense="0", pruned=small(evaluation.velocity_error)),
        Row(
            label="last block's output, relative error",
            dense="0",
            pruned=small(evaluation.block_error),
        ),
        Row(label="final latents, relative error", dense="0", pruned=small(evaluation.latents_relative)),
        Row(label="pictures, PSNR", dense="identical", pruned=psnr),
        Row(label="pictures, SSIM", dense="1", pruned=f"{evaluation.ssim:.3f}"),
    ]
    if evaluation.lpips is not None:
        rows.append(Row(label="pictures, LPIPS", dense="0", pruned=f"{evaluation.lpips:.3f}"))
    named = dict(evaluation.scores)
    if evaluation.fid_clip is not None:
        named["FID to the reference pictures, in CLIP's features"] = evaluation.fid_clip
    for label, pair in named.items():
        change = f"{pair.pruned - pair.dense:+.3g}"
        rows.append(Row(label=label, dense=f"{pair.dense:.4g}", pruned=f"{pair.pruned:.4g}", ratio=change))
    return rows if evaluation.guidance is None else [*rows, _retuned(evaluation.guidance)]


def _retuned(sweep: GuidanceSweep) -> Row:
    dense, pruned = sweep.dense_best, sweep.pruned_best
    return Row(
        label=f"{sweep.judge}, each at its best guidance",
        dense=f"{points(sweep, dense.dense)} at {dense.guidance_scale:g}",
        pruned=f"{points(sweep, pruned.pruned)} at {pruned.guidance_scale:g}",
        ratio=f"{100 * (pruned.pruned - dense.dense):+.1f} points"
        if sweep.judge == OBEDIENCE
        else f"{pruned.pruned - dense.dense:+.3g}",
    )


def _done(report: Report) -> str:
    pruned = [layer for layer in report.layers if layer.pattern != "dense"]
    if not pruned:
        return "Nothing was pruned: the model is as it was given."
    kept = report.pruned.nonzero / report.dense.nonzero if report.dense.nonzero else 1.0
    said = (
        f"{len(pruned)} of {len(report.layers)} linears were pruned to {report.sparsity} by {report.method}:"
        f" {percent(1 - kept)} of the denoiser's weights are gone or zero."
    )
    before, after = report.dense.bytes_on_disk, report.pruned.bytes_on_disk
    stored = not isinstance(before, NotMeasured) and not isinstance(after, NotMeasured) and after > 0.98 * before
    if stored and has_pattern(report.sparsity):
        said += " The file is no smaller: zeros are stored like other numbers."
    return said


def _speed(report: Report) -> str:
    if isinstance(report.latency, NotMeasured):
        return f"Whether it is faster was not measured: {report.latency.why}."
    latency = report.latency[0]
    dense, pruned = milliseconds(latency.dense.p50_ms), milliseconds(latency.pruned.p50_ms)
    found = f"{latency.what}, {latency.backend}: {pruned}, dense {dense} (medians of {latency.pruned.count} runs)"
    said = {
        "faster": f"Faster here: {found}, {speedup(latency)}.",
        "slower": f"Slower here: {found}, {speedup(latency)}.",
        "no different": f"No faster here: {found}; the difference is within the noise, {speedup(latency)}.",
        "unknown": f"Too few runs to tell: {found}.",
    }[latency.verdict]
    if has_pattern(report.sparsity) and "CPU" in latency.backend:
        said += " Zeros inside a matrix give no speed-up on a CPU: it multiplies them like any other number."
    return said


def _goodness(report: Report) -> str:
    evaluation = report.evaluation
    if isinstance(evaluation, NotMeasured):
        return f"Quality was not measured: {evaluation.why}."
    pictures = (
        "the pictures are identical"
        if evaluation.psnr_db is None
        else f"pictures against the dense ones: PSNR {evaluation.psnr_db:.1f} dB, SSIM {evaluation.ssim:.3f}"
    )
    said = f"Velocity error {small(evaluation.velocity_error)} along the dense trajectory; {pictures}."
    dense, pruned = evaluation.dense_obedience, evaluation.pruned_obedience
    if dense is None or pruned is None:
        return said
    return (
        f"The pruned model obeys {obedience(pruned)} of the prompts, {interval(pruned)}; the dense one"
        f" {obedience(dense)}, {interval(dense)}. {said}"
    )
