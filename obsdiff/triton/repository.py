"""Writes the model repository of a bundle: whole, or not at all."""

import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff.folders import new_folder
from obsdiff.triton.configs import (
    GRAPH,
    Choice,
    component_config,
    orchestrator_config,
    plan_of,
    servable,
)
from obsdiff.triton.pbtxt import Message, render
from obsdiff_runtime.bundle import MANIFEST, Bundle, description
from obsdiff_runtime.decoding import encode
from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.kinds.table import kind_of
from obsdiff_runtime.triton import DESCRIPTION, model_of

VERSION: Final = "1"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_REFERENCES: Final = "reference pictures: Triton's model takes none; obsdiff serve does"
_NO_LINK: Final = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What was written.

    Attributes:
        path: of the folder.
        model: that takes prompts.
        components: name of each other model -> "tensorrt" or "onnxruntime".
        tensorrt: version that Triton must have for the engines; None where there are none.
        left_out: engines and what the bundle could be told, and why.
    """

    path: str
    model: str
    components: dict[str, str]
    tensorrt: str | None
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        written: dict[str, Any] = encode(self)
        return written


def check_name(name: str) -> str:
    """The name, if Triton and a folder can have it; else ConfigError."""
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"--name {name!r}: a model's name has letters, digits, - and _, up to 64 of them")
    return name


def write_repository(bundle: Bundle, output: Path, choice: Choice, *, force: bool = False) -> Repository:
    """A model for each component, and the one that draws by calling them.

    Graphs and engines are hard links to the bundle's files where the file system allows it, else copies.

    Args:
        bundle: verified; it is only read.
        output: folder to create.
        choice: names and sizes.
        force: replace an earlier result.

    Raises:
        ConfigError: the folder is taken, or the name is none.
        CompatibilityError: Triton cannot run this bundle.
    """
    check_name(choice.name)
    manifest = bundle.manifest
    if manifest.defaults.num_frames is not None:
        raise CompatibilityError(
            f"{bundle.root} draws films, and Triton's model draws pictures alone; use obsdiff serve"
        )
    references = kind_of(manifest.pipeline_class).references
    if references is not None and references.least:
        raise CompatibilityError(f"{bundle.root} edits pictures, and Triton's model takes none; use obsdiff serve")
    models = {component: model_of(choice.name, component) for component in manifest.components}
    configs = {
        component: component_config(component, models[component], entry, choice)
        for component, entry in manifest.components.items()
    }
    with new_folder(output, force=force) as folder:
        for component, model in models.items():
            place = _place(folder, model, configs[component])
            _put_networks(bundle, component, place)
        place = _place(folder, choice.name, orchestrator_config(manifest, choice))
        shutil.copyfile(Path(__file__).with_name("model.py"), place / "model.py")
        for relative in (MANIFEST, *description(manifest)):
            target = place / DESCRIPTION / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.root / relative, target)  # small, and edited by hand in one place or the other
        engines = {component: servable(entry)[0] for component, entry in manifest.components.items()}
        written = Repository(
            path=str(output),
            model=choice.name,
            components={
                models[component]: "tensorrt" if found else "onnxruntime" for component, found in engines.items()
            },
            tensorrt=next((found[0].backend_version for found in engines.values() if found), None),
            left_out=(
                *(reason for entry in manifest.components.values() for reason in servable(entry)[1]),
                *([] if references is None else [_REFERENCES]),
            ),
        )
        (folder / "README.md").write_text(_readme(written), encoding="utf-8")
    return written


def _place(folder: Path, model: str, config: Message) -> Path:
    """The folder of the model's only version."""
    place = folder / model / VERSION
    place.mkdir(parents=True)
    (folder / model / "config.pbtxt").write_text(render(config), encoding="utf-8")
    return place


def _put_networks(bundle: Bundle, component: str, place: Path) -> None:
    entry = bundle.component(component)
    engines, _ = servable(entry)
    for engine in engines:
        link_or_copy(bundle.path(engine.path), place / plan_of(engine))
    if engines:
        return
    link_or_copy(bundle.onnx(component), place / GRAPH)
    beside = f"{Path(entry.onnx).parent.as_posix()}/"  # external data, which the graph names by its file's name
    for relative in bundle.manifest.files:
        if relative.startswith(beside) and relative != entry.onnx and not relative.endswith(".json"):
            target = place / relative.removeprefix(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(bundle.path(relative), target)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)


def _readme(written: Repository) -> str:
    rows = "".join(f"| `{model}` | {backend} |\n" for model, backend in written.components.items())
    version = f"\nThe engines need a Triton with TensorRT {written.tensorrt}.\n" if written.tensorrt else ""
    return (
        f"# {written.model}\n\n"
        f"A model repository of Triton Inference Server. `{written.model}` takes prompts and calls the others:\n\n"
        f"| model | backend |\n|---|---|\n{rows}{version}\n"
        "Triton's Python needs obsdiff-runtime (it brings numpy, pillow and tokenizers; no torch):\n\n"
        "    pip install obsdiff-runtime\n"
        "    tritonserver --model-repository FOLDER\n"
    )
