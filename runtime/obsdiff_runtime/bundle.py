"""The bundle: a deployable folder, its manifest, and the check that both still agree.

A bundle is optimum's ONNX folder layout with `obsdiff.json` at its root. The manifest lists every file with size and
sha256, except itself and README.md (a model card, which people edit). Files that are not listed may lie beside them;
they are never opened: a `Bundle` hands out paths of listed files only.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from obsdiff_runtime.decoding import decode, encode
from obsdiff_runtime.errors import BundleError, CompatibilityError
from obsdiff_runtime.shapes import Range
from obsdiff_runtime.turns import Turns

SCHEMA: Final = 1
MANIFEST: Final = "obsdiff.json"
DECODER: Final = "vae_decoder"  # component; of a film's first latent frame
NEXT_DECODER: Final = "vae_decoder_next"  # of each of the others
ENCODER: Final = "vae_encoder"  # of a picture; of a film's first frame
NEXT_ENCODER: Final = "vae_encoder_next"  # of the frames of each further latent frame
AUTOENCODER: Final = (DECODER, NEXT_DECODER, ENCODER, NEXT_ENCODER)
IMAGE_ENCODER: Final = "image_encoder"
DENOISERS: Final = ("transformer", "unet")  # what a denoiser that takes all steps is called
UNLISTED: Final = frozenset({MANIFEST, "README.md"})
MAX_JSON_BYTES: Final = 64 * 2**20
CHUNK_BYTES: Final = 2**20

Verify = Literal["full", "sizes"]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """An input or output of a graph; symbolic sizes are strings: ("batch", 4, "height", "width")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """An engine built from a component's graph.

    Attributes:
        path: of the plan, relative to the bundle.
        key: hash over graph content, builder and version, targets, precision, profile and flags.
        backend: "tensorrt", "tensorrt_rtx" or "onnxruntime".
        backend_version: version of the builder.
        targets: what it runs on: compute capabilities ("8.6", "8.9"), or a provider of ONNX Runtime ("cuda:8.9").
        device: name of the one GPU it was built on and tuned for; "" where it was built for a kind of GPU.
        profiles: the shapes it takes; see `obsdiff_runtime.shapes.serving`.
        sparse_requested: sparse kernels were allowed.
        refit: "no"; "yes", its weights can be replaced; "stripped", they must be, it holds none.
        weight_streaming: weights can stay in the host's memory.
        sparsity: what is known of sparse kernels, in words.
        receipt: path of the proof per layer, relative to the bundle.
    """

    path: str
    key: str
    backend: str
    backend_version: str
    targets: tuple[str, ...] = ()
    device: str = ""
    profiles: tuple[Mapping[str, Range], ...] = field(default=(), hash=False)
    sparse_requested: bool = False
    refit: str = "no"
    weight_streaming: bool = False
    sparsity: str = ""
    receipt: str | None = None


@dataclass(frozen=True, kw_only=True)
class ComponentEntry:
    """A network of the pipeline.

    Attributes:
        onnx: its graph, relative to the bundle.
        dtype: of its weights, or of what is around those that have eight bits.
        precision: "int8" or "fp8" where its linears compute in it, else the dtype; "" in older bundles.
    """

    onnx: str
    dtype: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    engines: tuple[EngineEntry, ...] = ()
    precision: str = ""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a call uses where it is told nothing.

    Attributes:
        num_frames: of a film; None where pictures are drawn.
        max_sequence_length: tokens of T5, or of the zeros in its place.
        vae_tile: pixels per side of the tiles that pictures go through the autoencoder in; None where they go whole.
        guidance_scale_2: of the denoisers behind the first, where some take turns; None: as the first one's.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    num_frames: int | None = None
    max_sequence_length: int | None = None
    vae_tile: int | None = None
    guidance_scale_2: float | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of obsdiff.json.

    Attributes:
        schema: version of this layout.
        created_by: program and version: "obsdiff 0.1.0".
        family: architecture of the denoiser: "sd3", "unet", "flux", "chroma", "flux2", "pixart", "auraflow", "sana",
            "qwen", "lumina2", "zimage", "hunyuan", "dit", "wan".
        pipeline_class: diffusers class; decides how the runtime samples.
        sparsity: as given on the command line: "2:4"; "dense" where nothing was pruned.
        defaults: of a call.
        components: by folder name.
        turns: see turns.py; empty where one denoiser takes all steps.
        files: every file by path relative to the bundle, with "/" on every system.
        recipe: the resolved configuration of the run.
        measurements: what was measured, and on what.
    """

    created_by: str
    family: str
    pipeline_class: str
    sparsity: str
    defaults: Defaults
    components: Mapping[str, ComponentEntry]
    turns: Turns = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    measurements: Mapping[str, object] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The components that are called at the steps, the first of them first; empty where there is none."""
        return tuple(self.turns) or tuple(name for name in DENOISERS if name in self.components)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder whose listed files were found as the manifest says; its JSON files are read once."""

    root: Path
    manifest: Manifest
    _read: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def has(self, relative: str) -> bool:
        return relative in self.manifest.files

    def path(self, relative: str) -> Path:
        """Where a listed file lies.

        Raises:
            BundleError: the manifest does not list it.
        """
        if not self.has(relative):
            raise BundleError(f"{self.root}: {relative} is not a file of this bundle; was it added by hand?")
        return self.root / relative

    def json(self, relative: str) -> dict[str, Any]:
        """A listed JSON file that holds an object."""
        if relative not in self._read:
            self._read[relative] = _read_json(self.path(relative))
        return dict(self._read[relative])

    def component(self, name: str) -> ComponentEntry:
        if name not in self.manifest.components:
            names = ", ".join(sorted(self.manifest.components))
            raise BundleError(f"{self.root}: the bundle has no component {name}; it has {names}")
        return self.manifest.components[name]

    def onnx(self, name: str) -> Path:
        """Path of a component's graph."""
        return self.path(self.component(name).onnx)

    def config(self, name: str) -> dict[str, Any]:
        """config.json of a component."""
        return self.json(f"{name}/config.json")

    def scheduler(self) -> dict[str, Any]:
        return self.json("scheduler/scheduler_config.json")

    def index(self) -> dict[str, Any]:
        """model_index.json: the classes and options of the diffusers pipeline."""
        return self.json("model_index.json")

    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Lists every file of `folder` with size and sha256, and writes obsdiff.json there.

    Args:
        folder: complete but for the manifest; it holds no links.
        manifest: its `files` are ignored.

    Returns:
        The manifest with `files` filled.

    Raises:
        BundleError: a link in the folder, or a graph, engine or receipt that the manifest names and the folder lacks.
    """
    files = {
        relative: FileEntry(sha256=sha256(folder / relative), bytes=(folder / relative).stat().st_size)
        for relative in sorted(_walk(folder))
    }
    complete = dataclasses.replace(manifest, files=files)
    _check_references(complete, folder)
    text = json.dumps(encode(complete), indent=2, ensure_ascii=False, allow_nan=False)
    part = folder / f"{MANIFEST}.part"
    try:
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / MANIFEST)
    except BaseException:  # a full disk, or an interruption
        part.unlink(missing_ok=True)
        raise
    return complete


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone; no other file is looked at.

    Raises:
        BundleError: no bundle, or a manifest that cannot be read; says which field.
        CompatibilityError: written by a newer obsdiff.
    """
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; `obsdiff export` makes one")
    data = _read_json(path)
    schema = data.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise CompatibilityError(
            f"{path}: the bundle has schema {schema}, this obsdiff-runtime reads up to {SCHEMA}; "
            "upgrade it: pip install --upgrade obsdiff-runtime"
        )
    if schema != SCHEMA:
        raise BundleError(
            f"{path}: schema should be {SCHEMA}, not {schema!r}: it is damaged, or not a bundle that obsdiff wrote"
        )
    manifest = decode(Manifest, data, source=str(path))
    for relative, entry in manifest.files.items():
        _check_path(relative, path)
        if entry.bytes < 0 or len(entry.sha256) != 64:
            raise BundleError(f"{path}: files.{relative} has no valid size and sha256")
    _check_references(manifest, folder)
    return manifest


def open_bundle(path: Path | str, verify: Verify = "full", *, networks: bool = True) -> Bundle:
    """Opens a bundle after checking its files against the manifest.

    Args:
        path: the folder.
        verify: "full" compares sha256 of every file, "sizes" presence and size only.
        networks: False where graphs, weights and engines are elsewhere: only `description` is looked for, and found in
            the bundle.

    Raises:
        BundleError: no bundle; or a file is missing, truncated, altered, a link, or outside the folder; names the file.
        CompatibilityError: written by a newer obsdiff.
    """
    if verify not in ("full", "sizes"):
        raise ValueError(f"verify is 'full' or 'sizes', not {verify!r}")
    root = Path(path)
    manifest = read_manifest(root)
    if not networks:
        files = {relative: manifest.files[relative] for relative in description(manifest)}
        manifest = dataclasses.replace(manifest, files=files)
    for relative, entry in manifest.files.items():
        try:
            _check_size(root, relative, entry)
        except (OSError, ValueError) as error:  # ValueError: a name that no file system has
            raise BundleError(f"{root}: {relative!r} cannot be read: {error}") from error
    if verify == "full":
        for relative, entry in manifest.files.items():
            if sha256(root / relative) != entry.sha256:
                raise BundleError(f"{root / relative} was altered after export: its sha256 is not the manifest's")
    return Bundle(root=root, manifest=manifest)


def description(manifest: Manifest) -> list[str]:
    """The files that say how the networks are used: configurations, tokenizers, the scheduler."""
    folders = (*(f"{name}/" for name in manifest.components), "engines/")
    return [
        relative
        for relative in manifest.files
        if not relative.startswith(folders) or PurePosixPath(relative).name == "config.json"
    ]


def _check_size(root: Path, relative: str, entry: FileEntry) -> None:
    path = root / relative
    inside = root
    for part in PurePosixPath(relative).parts:
        inside = inside / part
        if inside.is_symlink():
            raise BundleError(f"{inside} is a link; a bundle holds files only: copy the target in its place")
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle; copy or export it again")
    size = path.stat().st_size
    if size != entry.bytes:
        state = "truncated" if size < entry.bytes else "larger than exported"
        raise BundleError(f"{path} is {state}: {size} bytes, the manifest says {entry.bytes}; copy or export it again")


def _check_path(relative: str, source: Path) -> None:
    pure = PurePosixPath(relative)
    strange = "\\" in relative or ":" in relative or "\0" in relative
    if pure.is_absolute() or ".." in pure.parts or strange or str(pure) != relative or relative in ("", "."):
        raise BundleError(f"{source}: files.{relative!r} is no plain path inside the bundle")


def _check_references(manifest: Manifest, folder: Path) -> None:
    for name in manifest.turns:
        if name not in manifest.components:
            raise BundleError(f"{folder}: {name} is to take its turn, and the bundle has no such component")
    for name, component in manifest.components.items():
        paths = [component.onnx]
        for engine in component.engines:
            paths += [engine.path] + ([engine.receipt] if engine.receipt is not None else [])
        for path in paths:
            if path not in manifest.files:
                raise BundleError(f"{folder}: component {name} names {path}, which is not a file of the bundle")


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if (Path(root) / name).is_symlink():
                raise BundleError(f"{Path(root) / name} is a link; a bundle holds files only")
        for name in names:
            relative = (Path(root) / name).relative_to(folder).as_posix()
            if relative not in UNLISTED:
                _check_path(relative, folder)
                yield relative


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BundleError(f"{path} is larger than {MAX_JSON_BYTES} bytes, too large for a configuration")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} should hold a JSON object")
    return data


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
