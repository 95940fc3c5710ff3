"""A component's weight files: which tensor lies where; read into the component, or left where they are.

    STEM.safetensors                                       one file
    STEM.safetensors.index.json, STEM-*.safetensors        several, and what is in which

The stem is diffusers' or transformers'; they write a variant in front of the last suffix.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from obsdiff_export.stored import StoredParameter
from obsdiff_runtime.errors import BundleError

STEM: Final = "diffusion_pytorch_model"
TRANSFORMERS_STEM: Final = "model"
CONVERT: Final = "pickled ones are not read: convert them with save_pretrained(safe_serialization=True)"


def main_dtype(module: nn.Module) -> torch.dtype:
    """Of its largest parameter: diffusers keeps small ones of some models in float32, whatever the others are in."""
    return max(module.parameters(), key=Tensor.numel).dtype


def read(
    folder: Path, expected: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, wide: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors in a folder that diffusers wrote: each of `expected`, with its shape, once, and no other.

    Args:
        folder: of the component.
        expected: its state dictionary, on any device.
        dtype: of floating tensors; None: as stored.
        wide: modules and parameters that are float32 where a dtype is given, by their own names.

    Raises:
        BundleError: a file or tensor is missing, altered or superfluous; names it.
    """
    found = {name: tensor for name, (_, _, tensor) in _found(folder, expected, STEM, None).items()}
    if dtype is None:
        return found
    kept = {name for name in found if not set(wide).isdisjoint(name.split("."))}
    return {
        name: tensor.to(torch.float32 if name in kept else dtype) if tensor.is_floating_point() else tensor
        for name, tensor in found.items()
    }


def leave(
    module: nn.Module,
    folder: Path,
    *,
    stem: str = STEM,
    variant: str | None = None,
    renamed: Callable[[str], str] = lambda name: name,
) -> None:
    """Points a module's parameters at its files, and reads its buffers, which are small. Changes the module.

    Args:
        module: its parameters on the meta device. Of tied ones, one name in the files is enough.
        folder: of the component.
        stem: of the files.
        variant: of the files.
        renamed: the module's name of a tensor, from that in the files.

    Raises:
        BundleError: as `read`; the module is as before then.
    """
    names = {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
    found = _found(folder, module.state_dict(), stem, variant, same=names, renamed=renamed)
    stored = {
        names[name]: StoredParameter(tensor, path, key) for name, (path, key, tensor) in found.items() if name in names
    }
    for name in module.state_dict():
        owner, _, leaf = name.rpartition(".")
        if name in names:
            module.get_submodule(owner)._parameters[leaf] = stored[names[name]]
        else:
            module.get_submodule(owner)._buffers[leaf] = found[name][2].clone()


def stored_encoder(folder: Path, kind: str, *, variant: str | None = None) -> nn.Module | None:
    """A text encoder of transformers, with its weights left in their files.

    Args:
        folder: of the component.
        kind: its class.
        variant: of the files.

    Returns:
        None where its files hold other tensors than its class has, as CLIP's of older checkpoints do.
    """
    made = getattr(transformers, kind)
    with init_empty_weights(include_buffers=False):
        encoder: Any = made(made.config_class.from_pretrained(folder, local_files_only=True))
    encoder.tie_weights()
    try:
        leave(encoder, folder, stem=TRANSFORMERS_STEM, variant=variant, renamed=_renaming(encoder))
    except BundleError:
        return None
    return encoder.eval()  # type: ignore[no-any-return]


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers calls a tensor of the model, from the name that older versions gave it in a file."""
    known = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    names = model.state_dict()

    def renamed(name: str) -> str:
        found: str = rename_source_key(name, known, [], model.base_model_prefix, names)[0]
        return found

    return renamed


def shapes(folder: Path) -> dict[str, torch.Size]:
    """Of every tensor in a folder that diffusers wrote; BundleError for a file that cannot be read."""
    return {name: tensor.shape for path in _files(folder, STEM, None) for name, tensor in _tensors(path)}


def _found(
    folder: Path,
    expected: Mapping[str, Tensor],
    stem: str,
    variant: str | None,
    *,
    same: Mapping[str, object] = MappingProxyType({}),
    renamed: Callable[[str], str] = lambda name: name,
) -> dict[str, tuple[Path, str, Tensor]]:
    """By name, where each tensor lies and is called, and itself, mapped; of names that are `same`, one is enough."""
    found: dict[str, tuple[Path, str, Tensor]] = {}
    for path, names in _files(folder, stem, variant).items():
        for key, tensor in _tensors(path):
            name = renamed(key)
            if name not in expected:
                raise BundleError(f"{path}: tensor {name} does not belong to this model")
            if tensor.shape != expected[name].shape:
                shapes = f"{tuple(tensor.shape)}, and the model takes {tuple(expected[name].shape)}"
                raise BundleError(f"{path}: tensor {name} has shape {shapes}")
            if name in found:
                raise BundleError(f"{path}: tensor {name} is in another file too")
            found[name] = (path, key, tensor)
        for name in names:
            if renamed(name) not in found:
                raise BundleError(f"{path}: tensor {name} is missing")
    have = {same.get(name, name) for name in found}
    absent = next((name for name in expected if same.get(name, name) not in have), None)
    if absent is not None:
        raise BundleError(f"{folder}: tensor {absent} is in no weight file")
    return found


def _files(folder: Path, stem: str, variant: str | None) -> dict[Path, list[str]]:
    """Each weight file, with the tensors that the index of several promises in it."""
    mark = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{mark}.json"
    if not index.is_file():
        return {folder / f"{stem}{mark}.safetensors": []}
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{index}: has no weight_map") from None
    files: dict[Path, list[str]] = {}
    for name, shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BundleError(f"{index}: {name} is said to be in {shard!r}, which is no file beside it")
        files.setdefault(folder / shard, []).append(name)
    return files


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if not path.is_file():
        raise BundleError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise BundleError(f"{path} is truncated or altered: {error}") from None
