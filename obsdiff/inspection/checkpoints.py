"""What is in a diffusers folder, pruned by obsdiff or by anybody: the denoiser's manifest and its stored weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from obsdiff.folders import MANIFEST, component_files
from obsdiff.inspection.stored import StoredTensor, tensors
from obsdiff_export.survey import WIDTHS, holding
from obsdiff_runtime.controls import NETWORK
from obsdiff_runtime.errors import BundleError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.turns import BEHIND

if TYPE_CHECKING:
    from obsdiff.manifest import LinearRecord, PrunedManifest

INDEX: Final = "model_index.json"
DENOISERS: Final = ("transformer", "unet", "prior", "transformer_2")
"""Folders that a pipeline keeps its denoiser in."""

_BRIEF: Final = ("method", "allocation", "align", "damp", "draws", "fast", "dense_share", "sampling")
"""The settings of a recipe that say most."""


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
    """A linear in the stored weights.

    Attributes:
        name: the module's.
        k, n_out: widths as stored.
        dtype: of the stored weights.
        pattern: that the manifest says it was given; None where it says nothing of it.
        holds: the N:M that are there.
        zeros: share of its weights that are zero, counted.
        loss: tr(dW G dW^T) / tr(W G W^T) on the calibration tokens; None where it was not measured.
        reason: why it stayed dense, where it did.
    """

    name: str
    k: int
    n_out: int
    dtype: str
    pattern: str | None
    holds: tuple[str, ...]
    zeros: float | None
    loss: float | None = None
    reason: str | None = None

    @property
    def keeps_its_word(self) -> bool:
        """Whether the N:M that the manifest tells of is there."""
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern or "")
        if match is None:
            return True
        n, m = int(match[1]), int(match[2])
        held = [(1, 1) if told == "all zero" else tuple(map(int, told.split(":"))) for told in self.holds]
        return m not in WIDTHS or any(m % width == 0 and have * m >= n * width for have, width in held)


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """A denoiser in a diffusers folder.

    Attributes:
        path: the folder that was asked about.
        pipeline_class: of the pipeline, "" where the folder is the denoiser's alone.
        denoiser: its folder's name and class: "transformer SD3Transformer2DModel"; where it was pruned with its
            ControlNet, whose linears are called "controlnet....", that one's behind it.
        created_by, family, sparsity: as the manifest says; "" where there is none.
        kept: group -> (units kept, units before), of the groups that were cut.
        parameters, zeros: numbers in the stored weights, and how many of them are zero; None where a type is not known.
        bytes: of the weight files.
        linears: the matrices.
        recipe: what says most of the run that made it.
        prompts_sha256: of the calibration prompts.
        notes: what does not fit together, and what was not looked at.
    """

    path: str
    pipeline_class: str
    denoiser: str
    created_by: str
    family: str
    sparsity: str
    kept: Mapping[str, tuple[int, ...]]
    parameters: int
    zeros: int | None
    bytes: int
    linears: tuple[StoredLinear, ...]
    recipe: Mapping[str, object]
    prompts_sha256: str
    notes: tuple[str, ...]
    kind: Literal["checkpoint"] = "checkpoint"


def denoiser_folder(path: Path) -> Path | None:
    """The denoiser's folder in a pipeline's, or the folder itself where it is one; None where there is none."""
    candidates = [path / name for name in DENOISERS] if (path / INDEX).is_file() else [path]
    return next((folder for folder in candidates if any(folder.glob("*.safetensors"))), None)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a pipeline or a denoiser."""
    return (folder / INDEX).is_file() or denoiser_folder(folder) is not None


def read(path: Path, progress: Progress = silent) -> CheckpointContent:
    """Reads a diffusers folder, or a denoiser's alone; every stored weight is looked at.

    Raises:
        BundleError: there are no weights, or a file cannot be read.
        CompatibilityError: its manifest is of a newer schema.
    """
    folder = denoiser_folder(path)
    if folder is None:
        raise BundleError(f"{path}: no safetensors in {' or '.join(DENOISERS)}; is the checkpoint complete?")
    manifest = _manifest(folder)
    records = {} if manifest is None else manifest.linears
    beside = folder.parent / NETWORK
    steered = any(name.startswith(f"{NETWORK}.") for name in records) and beside.is_dir()
    folders = {folder: "", beside: f"{NETWORK}."} if steered else {folder: ""}
    weighed = _weigh(folders, records, progress)
    return CheckpointContent(
        path=str(path),
        pipeline_class=_class_of(path / INDEX),
        denoiser=", ".join(f"{each.name} {_class_of(each / 'config.json')}".strip() for each in folders),
        created_by="" if manifest is None else manifest.created_by,
        family="" if manifest is None else manifest.family,
        sparsity="" if manifest is None else manifest.sparsity,
        kept={} if manifest is None else {name: (len(cut.kept), cut.units) for name, cut in manifest.groups.items()},
        parameters=weighed.parameters,
        zeros=None if weighed.unknown else weighed.zeros,
        bytes=weighed.bytes,
        linears=tuple(weighed.linears),
        recipe={} if manifest is None else {key: manifest.recipe[key] for key in _BRIEF if key in manifest.recipe},
        prompts_sha256="" if manifest is None else manifest.prompts_sha256,
        notes=(*weighed.notes(records), *_others(path, folder)),
    )


def _others(path: Path, folder: Path) -> list[str]:
    """That a pipeline has another denoiser, which takes turns with this one."""
    other = path / f"{folder.name}{BEHIND}"
    return [f"{other.name} takes turns with {folder.name}; obsdiff inspect {other} shows it"] if other.is_dir() else []


class _Weighed:
    """What was counted in the weight files, tensor by tensor."""

    def __init__(self) -> None:
        self.parameters = self.zeros = self.bytes = 0
        self.linears: list[StoredLinear] = []
        self.unknown: list[str] = []

    def add(self, tensor: StoredTensor, prefix: str, records: "Mapping[str, LinearRecord]") -> None:
        """Counts one; names of linears have the prefix."""
        self.parameters += prod(tensor.shape)
        if tensor.bits is None:
            if prod(tensor.shape):
                self.unknown.append(f"{tensor.name}: {tensor.dtype} is not known here, so its zeros are not counted")
            return
        name = f"{prefix}{tensor.name}".removesuffix(".weight")
        if tensor.name.endswith(".weight") and (tensor.bits.ndim == 2 or name in records):
            linear = _linear(name, tensor, tensor.bits.reshape(len(tensor.bits), -1), records.get(name))
            self.zeros += round((linear.zeros or 0) * tensor.bits.size)
            self.linears.append(linear)
        else:
            self.zeros += int(np.count_nonzero((tensor.bits & tensor.bits.dtype.type(tensor.mask)) == 0))

    def notes(self, records: "Mapping[str, LinearRecord]") -> list[str]:
        """What does not fit together."""
        names = {linear.name for linear in self.linears}
        lost = [
            f"{name}: the manifest tells of it, and its weight is not stored" for name in records if name not in names
        ]
        broken = [
            f"{linear.name}: the manifest says {linear.pattern}, and {_told(linear)}"
            for linear in self.linears
            if not linear.keeps_its_word
        ]
        return [*self.unknown, *lost, *broken]


def _weigh(folders: Mapping[Path, str], records: "Mapping[str, LinearRecord]", progress: Progress) -> _Weighed:
    """What is in some folders; names of linears in each have a prefix of its own."""
    weighed = _Weighed()
    files = [(file, prefix) for folder, prefix in folders.items() for file in sorted(component_files(folder)[0])]
    for index, (file, prefix) in enumerate(files):
        progress("weights", index, len(files), file.name)
        weighed.bytes += file.stat().st_size
        for tensor in tensors(file):
            weighed.add(tensor, prefix, records)
    progress("weights", len(files), len(files))
    return weighed


def _linear(
    name: str, tensor: StoredTensor, bits: np.ndarray[Any, np.dtype[Any]], record: "LinearRecord | None"
) -> StoredLinear:
    zeros, holds = holding(bits, tensor.mask)
    return StoredLinear(
        name=name,
        k=tensor.shape[1],
        n_out=tensor.shape[0],
        dtype=tensor.dtype,
        pattern=None if record is None else record.pattern,
        holds=holds,
        zeros=zeros,
        loss=None if record is None else record.loss,
        reason=None if record is None else record.reason,
    )


def _told(linear: StoredLinear) -> str:
    return f"the stored weights hold {', '.join(linear.holds) or 'no pattern'} with {linear.zeros or 0:.1%} zeros"


def _manifest(folder: Path) -> "PrunedManifest | None":
    if not (folder / MANIFEST).is_file():
        return None
    from obsdiff.manifest import read_manifest  # imports torch: only where there is something of ours

    return read_manifest(folder)


def _class_of(path: Path) -> str:
    """The class that a configuration names, "" where it names none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    name = data.get("_class_name") if isinstance(data, dict) else None
    return name if isinstance(name, str) else ""
