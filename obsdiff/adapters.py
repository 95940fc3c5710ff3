"""LoRAs of the dense model on a pruned one: cut to its widths, in the order of its channels.

    n, k      a layer's output and input width in the dense model
    r         rank

A LoRA adds up @ down * scale to a weight, down (r, k) and up (n, r). What pruning did to the weight's rows and columns
is done to these; what it did to the values that stayed is not undone, so the sum is what the LoRA does to the pruned
model. Zeros of a pattern stay zeros only where the LoRA is merged (`merge`).
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from obsdiff.families import Family
from obsdiff.folders import let_read
from obsdiff.manifest import PrunedManifest
from obsdiff_runtime.errors import ConfigError, ModelError

NOISES: Final = ("high", "low")
"""What those who train LoRAs of two denoisers that take turns call them in names of files, in their order."""

_NOISE: Final = re.compile(r"(?P<which>high|low)[ _.-]?noise", re.IGNORECASE)
_PEFT: Final = "base_model.model."
"""What names begin with in a file that PEFT wrote of a denoiser alone, whose scale is in another file."""
_PARTS: Final = re.compile(r"(?P<module>.+?)\.(?P<half>lora_A|lora_B)(\.default)?\.weight")


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a LoRA adds to one layer.

    Attributes:
        down: (r, k), or (r, k, height, width) of a convolution.
        up: (n, r), or (n, r, 1, 1).
        scale: of their product.
    """

    down: Tensor
    up: Tensor
    scale: float

    def product(self) -> Tensor:
        """(n, k), float32; of a convolution (n, k, height, width)."""
        found = self.up.flatten(1).float() @ self.down.flatten(1).float() * self.scale
        return found.view(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA.

    Attributes:
        deltas: by the name of a module of the denoiser.
        others: tensors for other networks, by their names in the file.
    """

    deltas: Mapping[str, Delta]
    others: Mapping[str, Tensor]


def assigned(denoisers: Sequence[str], adapter: str | Path | None, second: str | Path | None) -> dict[str, str | Path]:
    """The files of LoRAs by the denoisers that they are for.

    Args:
        denoisers: of the pipeline, in their order.
        adapter: the file of the first, if any.
        second: the file of the one behind it, if any.

    Raises:
        ConfigError: there is none, or one for a denoiser that is not there, or by its name for the other one.
    """
    if second is not None and len(denoisers) == 1:
        raise ConfigError(f"--second {second}: one denoiser takes all steps of this model; leave it out")
    files = {name: path for name, path in zip(denoisers, (adapter, second), strict=False) if path is not None}
    if not files:
        raise ConfigError("there is no LoRA; name its .safetensors")
    for name, noise in zip(denoisers, NOISES, strict=False) if len(denoisers) > 1 else ():
        said = _NOISE.search(Path(files.get(name, "")).stem)
        if said is not None and said["which"].lower() != noise:
            raise ConfigError(f"{files[name]}: is of {said[0]} by its name, and {name} is for {noise} noise")
    return files


def read(source: str | Path, pipeline_class: str, denoiser: str) -> Adapter:
    """A LoRA's file, in the layout of diffusers, PEFT or kohya; diffusers converts them.

    Args:
        source: a safetensors file.
        pipeline_class: whose LoRA it is.
        denoiser: "transformer" or "unet".

    Raises:
        ModelError: it is no LoRA, or one whose arithmetic is not known here (DoRA, LoKr, biases).
    """
    path = Path(source)
    if not path.is_file():
        raise ModelError(f"{source}: there is no such file; download the LoRA and name its .safetensors")
    reader = getattr(getattr(diffusers, pipeline_class), "lora_state_dict", None)
    if reader is None:
        raise ModelError(f"diffusers knows no LoRA of a {pipeline_class}")
    wants: dict[str, Any] = {"return_lora_metadata": True, "use_safetensors": True}
    if "return_alphas" in inspect.signature(reader).parameters:
        wants["return_alphas"] = True
    try:
        found = reader(str(path), **wants)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        said = str(error)  # of diffusers, which may name every tensor
        raise ModelError(f"{source}: cannot be read as a LoRA: {_advice(said) or shorten(said, 200)}") from None
    tensors, *more = found if isinstance(found, tuple) else (found,)
    told = {key: value for each in more if each for key, value in each.items()}
    return _sorted(
        str(source), convert_unet_state_dict_to_peft(tensors), convert_unet_state_dict_to_peft(told), denoiser
    )


def _advice(said: str) -> str | None:
    """What to do about a file of PEFT's own, if one of its names is in what is said."""
    return f"{_PEFT} is PEFT's own; save it with save_lora_weights() of the pipeline" if _PEFT in said else None


def _sorted(source: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any], denoiser: str) -> Adapter:
    """`told`: alphas by layer, and what PEFT records of a LoRA."""
    halves: dict[str, dict[bool, Tensor]] = {}
    others: dict[str, Tensor] = {}
    alphas = dict(told)
    for key, tensor in tensors.items():
        if not key.startswith(f"{denoiser}."):
            others[key] = tensor
            continue
        if key.endswith(".alpha"):
            alphas[key] = tensor
            continue
        match = _PARTS.fullmatch(key.removeprefix(f"{denoiser}."))
        if match is None:
            raise ModelError(f"{source}: {key} is no plain LoRA's (DoRA, LoKr and biases are not known here)")
        halves.setdefault(match["module"], {})[match["half"] == "lora_A"] = tensor
    if not halves:
        advice = _advice(next(iter(others), "")) or "is it for another model?"
        raise ModelError(f"{source}: it holds no LoRA of a {denoiser}; {advice}")
    deltas = {}
    for module, pair in halves.items():
        if len(pair) != 2:
            raise ModelError(f"{source}: {module} has only one of the two matrices of a LoRA")
        rank = len(pair[True])
        deltas[module] = Delta(down=pair[True], up=pair[False], scale=_alpha(alphas, denoiser, module, rank) / rank)
    return Adapter(deltas=deltas, others=others)


def _alpha(alphas: Mapping[str, Any], denoiser: str, module: str, rank: int) -> float:
    """A layer's own; else what PEFT recorded; else the rank, which is a scale of 1."""
    layer = f"{denoiser}.{module}"
    own = alphas.get(f"{layer}.alpha", alphas.get(f"{layer}.lora_A.weight.alpha"))
    patterns: Mapping[str, float] = alphas.get(f"{denoiser}.alpha_pattern") or {}
    recorded = next((alpha for pattern, alpha in patterns.items() if module.endswith(pattern)), None)
    return float(
        next(value for value in (own, recorded, alphas.get(f"{denoiser}.lora_alpha"), rank) if value is not None)
    )


def cut(adapter: Adapter, dense: nn.Module, family: Family, manifest: PrunedManifest) -> Adapter:
    """The LoRA for the pruned denoiser.

    Args:
        adapter: for the dense one.
        dense: the denoiser before pruning, on any device; only its shapes are looked at.
        family: of it.
        manifest: what pruning did.

    Raises:
        ModelError: it is for another denoiser.
    """
    rows, columns = places(dense, family, manifest)
    deltas = {}
    for name, delta in adapter.deltas.items():
        shape = _shape(dense, name)
        if shape is None or (len(delta.up), *delta.down.shape[1:]) != shape:
            what = "no such layer" if shape is None else f"a layer of {tuple(shape)}"
            raise ModelError(f"the LoRA is for another model: for its {name} this one has {what}")
        down, up = delta.down, delta.up
        deltas[name] = replace(
            delta,
            down=down[:, columns[name]].contiguous() if name in columns else down,
            up=up[rows[name]].contiguous() if name in rows else up,
        )
    return replace(adapter, deltas=deltas)


def places(dense: nn.Module, family: Family, manifest: PrunedManifest) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which rows and which columns of a dense layer are where in the pruned one, int64; absent layers are as before."""
    rows: dict[str, list[tuple[int, int, Tensor]]] = {}
    columns: dict[str, list[tuple[int, int, Tensor]]] = {}
    for group in family.groups(dense):
        moved = manifest.channels(group)
        if moved is None:
            continue
        for producer in group.producers:
            size = group.units * group.height(producer)
            for part in range(producer.parts):
                channels = moved if producer.free else manifest.kept_channels(group, producer)
                rows.setdefault(producer.name, []).append((producer.start + part * size, size, channels))
        for consumer in group.consumers:
            columns.setdefault(consumer.name, []).append((consumer.start, group.units * group.width, moved))
    lengths = {name: dense.get_parameter(f"{name}.weight").shape for name in (*rows, *columns)}
    return (
        {name: _joined(lengths[name][0], parts) for name, parts in rows.items()},
        {name: _joined(lengths[name][1], parts) for name, parts in columns.items()},
    )


def _joined(length: int, parts: list[tuple[int, int, Tensor]]) -> Tensor:
    """Indices along an axis of which some spans, (start, size, indices inside), were cut or reordered."""
    found, end = [], 0
    for start, size, inside in sorted(parts, key=lambda part: part[0]):
        found += [torch.arange(end, start), start + inside]
        end = start + size
    return torch.cat([*found, torch.arange(end, length)])


def _shape(denoiser: nn.Module, name: str) -> torch.Size | None:
    try:
        return denoiser.get_parameter(f"{name}.weight").shape
    except AttributeError:
        return None


def merge(denoiser: nn.Module, adapter: Adapter, manifest: PrunedManifest, *, strength: float = 1.0) -> int:
    """Adds the LoRA to the weights of the pruned denoiser; zeros of a pattern stay zeros. Changes the denoiser.

    Args:
        denoiser: pruned.
        adapter: cut for it.
        manifest: which of its linears hold a pattern.
        strength: of the LoRA.

    Returns:
        how many layers hold a pattern.
    """
    masked = 0
    for name, delta in adapter.deltas.items():
        weight = denoiser.get_parameter(f"{name}.weight").data
        change = strength * delta.product().to(weight.device)
        record = manifest.linears.get(name)
        if record is not None and record.zeros:
            change = change.where(weight != 0, 0)
            masked += 1
        weight.copy_((weight.float() + change).to(weight.dtype))
    return masked


def write(adapter: Adapter, path: Path, denoiser: str, *, strength: float = 1.0) -> None:
    """A file that diffusers' load_lora_weights reads; the denoiser's scales and strength are in its matrices."""
    tensors = dict(adapter.others)
    for name, delta in adapter.deltas.items():
        tensors[f"{denoiser}.{name}.lora_A.weight"] = delta.down
        tensors[f"{denoiser}.{name}.lora_B.weight"] = delta.up * (delta.scale * strength)
    # diffusers gives parts of a fused layer one and the same matrix, and a file holds none twice
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, path, metadata={"format": "pt"})
    let_read(path)
