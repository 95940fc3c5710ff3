"""The model card: README.md of a pruned folder or of a bundle, as the Hub reads it."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import diffusers
import yaml

from obsdiff import wording
from obsdiff.families import controls, dit, fills, parts, references
from obsdiff.measurements import NotMeasured, Report
from obsdiff.sampling import in_steps
from obsdiff.sparsity import NM, Unstructured, parse
from obsdiff.templates import environment
from obsdiff_runtime import openings

Kind = Literal["checkpoint", "bundle"]

LICENCE_KEYS: Final = ("license", "license_name", "license_link")
FOLDER: Final = "path/to/this/folder"


def write_card(report: Report, folder: Path, kind: Kind, *, base_model: str | None = None) -> None:
    """Writes README.md into a folder that is otherwise complete.

    Args:
        report: of the run that made the folder.
        folder: holds model_index.json.
        kind: a pruned diffusers folder, or a bundle.
        base_model: id of the dense model on the Hub; None where it is not from there.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    config = folder / "transformer" / "config.json"
    ends = config.is_file() and openings.ends(json.loads(config.read_text(encoding="utf-8")))
    text = render(report, index, kind, base_model=base_model, ends=ends)
    (folder / "README.md").write_text(text, encoding="utf-8")


def render(
    report: Report, index: Mapping[str, Any], kind: Kind, *, base_model: str | None = None, ends: bool = False
) -> str:
    """The card; `index` is the content of the folder's model_index.json, `ends` whether films end with a picture."""
    templates = environment(escape=False)
    templates.filters["cell"] = _cell
    evaluation = report.evaluation
    text = templates.get_template("card.md.j2").render(
        report=report,
        kind=kind,
        front_matter=_front_matter(report, index, kind, base_model),
        headline=wording.headline(report),
        summary=wording.summary(report),
        notes=wording.notes(report),
        absences=wording.absences(report),
        engine_sparsity=wording.engine_sparsity(report),
        sampling=None if isinstance(evaluation, NotMeasured) else evaluation.sampling,
        prompts=0 if isinstance(evaluation, NotMeasured) else len(evaluation.per_prompt),
        code=_code(report, index, kind, ends),
        limits=_limits(report, kind),
        size=wording.size,
        small=wording.small,
        proven=wording.proven,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def licence_of(folder: Path) -> dict[str, str]:
    """What the card of a model's folder says of its licence: license, license_name, license_link; {} where nothing."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    match = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match is not None else None
    except yaml.YAMLError:
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in LICENCE_KEYS if isinstance(data.get(key), str)}


def _front_matter(report: Report, index: Mapping[str, Any], kind: Kind, base_model: str | None) -> str:
    drawn = "video" if _draws_films(index) else "image"
    data: dict[str, Any] = {"library_name": "diffusers"}
    if not _draws_classes(index):  # the Hub has no word for that
        data["pipeline_tag"] = "image-to-video" if _begins(index) else f"text-to-{drawn}"
    if base_model is not None:
        data["base_model"] = base_model
    data["tags"] = ["obsdiff", "pruned", "sparsity", report.family, *(["onnx"] if kind == "bundle" else [])]
    return yaml.safe_dump(data | dict(report.licence), sort_keys=False, allow_unicode=True)


def _code(report: Report, index: Mapping[str, Any], kind: Kind, ends: bool) -> str:
    """A few lines that draw a picture, or a film, from the folder, the way it was compared."""
    evaluation = report.evaluation
    prompt, options = "0" if _draws_classes(index) else "a prompt", ""
    if not isinstance(evaluation, NotMeasured):
        prompt, sampling = evaluation.per_prompt[0].prompt, evaluation.sampling
        steps = in_steps(getattr(diffusers, str(index.get("_class_name"))), sampling.num_inference_steps)
        options = "".join(f", {name}={value}" for name, value in steps.items())
        options += f", {_guided(index, sampling.guidance_scale)}"
        if sampling.guidance_scale_2 is not None:
            options += f", guidance_scale_2={sampling.guidance_scale_2:g}"
        if sampling.num_frames is not None:
            options += f", num_frames={sampling.num_frames}"
        if sampling.max_sequence_length is not None:
            options += f", max_sequence_length={sampling.max_sequence_length}"
    quoted = json.dumps(prompt, ensure_ascii=False)
    reader, shown = _pictures(index, kind)
    if kind == "bundle":
        first, load = "from obsdiff_runtime import Pipeline", f'pipeline = Pipeline("{FOLDER}")'
        if _draws_films(index):
            first += ", films"
            if _begins(index):
                first += "\nfrom obsdiff_runtime.pictures import read_picture"
                load += '\npicture = read_picture("picture.png", pipeline.size_step)'
                quoted += ", image=picture"
                if ends:
                    load += '\nlast = read_picture("last.png", pipeline.size_step)'
                    quoted += ", last_image=last"
            drawn = f'films.write(pipeline({quoted}, seed=1).arrays[0], "film.webp")'
            return f"{first}\n{load}\n{drawn}"
        return f'{reader}{first}\n{load}\npipeline({quoted}{shown}, seed=1).pil()[0].save("drawn.png")'
    if parse(report.sparsity).structured:
        first, load = "import obsdiff", f'pipeline = obsdiff.load("{FOLDER}")'
    else:
        absent = "".join(f", {name}=None" for name in _absent(index))
        first = "from diffusers import DiffusionPipeline"
        load = f'pipeline = DiffusionPipeline.from_pretrained("{FOLDER}"{absent})'
    if _draws_classes(index):
        quoted = f"[{prompt}]" if prompt.isdecimal() else f"pipeline.get_label_ids([{quoted}])"
    if _draws_films(index):
        first = f"from diffusers.utils import export_to_video{', load_image' if _begins(index) else ''}\n{first}"
        quoted = f'load_image("picture.png"), {quoted}' if _begins(index) else _named(index, quoted)
        quoted += ', last_image=load_image("last.png")' if ends else ""
        return f'{first}\n{load}\nexport_to_video(pipeline({quoted}{options}).frames[0], "film.mp4")'
    return f'{reader}{first}\n{load}\npipeline({quoted}{shown}{options}).images[0].save("drawn.png")'


def _pictures(index: Mapping[str, Any], kind: Kind) -> tuple[str, str]:
    """An import, and arguments of a call, for the pictures that are told beside the prompt; not of films."""
    name = str(index.get("_class_name"))
    told = references.of(name)
    edits = told is not None and told.least > 0
    if kind == "bundle" and controls.steers(name):
        reader = "from obsdiff_runtime.pictures import read_picture\n"
        return reader, ', control=read_picture("edges.png", pipeline.size_step)'
    if kind == "bundle" and edits:
        reader = "from obsdiff_runtime.pictures import open_picture\n"
        return reader, ', reference=pipeline.fit(open_picture("picture.png"))'
    if kind == "bundle" or not (edits or controls.steers(name) or fills.keeps(name)):
        return "", ""
    shown = "edges" if controls.steers(name) else "picture"
    mask = ', mask_image=load_image("mask.png")' if fills.keeps(name) else ""
    return "from diffusers.utils import load_image\n", f', image=load_image("{shown}.png"){mask}'


def _named(index: Mapping[str, Any], prompt: str) -> str:
    """A prompt as the first argument of a pipeline's call."""
    return prompt if _first(index) == "prompt" else f"prompt={prompt}"


def _first(index: Mapping[str, Any]) -> str:
    """The first argument of a pipeline's call."""
    _, first, *_ = inspect.signature(getattr(diffusers, str(index["_class_name"])).__call__).parameters
    return first


def _draws_films(index: Mapping[str, Any]) -> bool:
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    return pipeline is not None and parts.draws_films(pipeline)


def _begins(index: Mapping[str, Any]) -> bool:
    """Whether films begin with a picture, to diffusers at least."""
    return _draws_films(index) and _first(index) == "image"


def _draws_classes(index: Mapping[str, Any]) -> bool:
    return index.get("_class_name") == dit.pipeline


def _guided(index: Mapping[str, Any], scale: float) -> str:
    """Arguments of guidance, on the empty negative prompt."""
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    argument = parts.GUIDANCE if pipeline is None else parts.guidance_argument(pipeline)
    return f"{argument}={scale}" + ("" if argument == parts.GUIDANCE else ', negative_prompt=""')


def _absent(index: Mapping[str, Any]) -> list[str]:
    """Components that are null and that diffusers wants to be told so."""
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    optional = getattr(pipeline, "_optional_components", [])
    null = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
    return [name for name in null if name not in optional]


def _limits(report: Report, kind: Kind) -> list[str]:
    sparsity = parse(report.sparsity)
    limits = []
    if isinstance(sparsity.pattern, NM):
        limits.append(
            f"The {sparsity.pattern} zeros are stored as numbers: no smaller file, and no faster where dense kernels"
            " run them, which is every CPU and TensorRT-RTX. Some NVIDIA GPUs have kernels that use 2:4; whether they"
            " are faster depends on GPU, precision and shape, so measure."
        )
    if isinstance(sparsity.pattern, Unstructured):
        limits.append("Zeros anywhere make no engine faster and no file smaller: this is a study of quality.")
    if sparsity.structured and kind == "checkpoint":
        limits.append("Widths differ from layer to layer: `obsdiff.load` reads the folder, plain diffusers does not.")
    evaluation = report.evaluation
    if not isinstance(evaluation, NotMeasured):
        limits.append(
            f"Quality was compared on {len(evaluation.per_prompt)} prompts at one size and one guidance scale; other"
            " prompts may fare worse."
        )
    limits.append("Nothing was trained: what the dense model cannot draw or should not be used for holds here too.")
    if not report.licence:
        limits.append("The licence of the dense model was not found; it applies to this model as well.")
    return limits


def _cell(text: object) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return " ".join(str(text).replace("|", "\\|").split())
