"""`obsdiff convert`: a model in a single file, as fine-tunes are handed around, becomes a diffusers folder.

Such a file holds a denoiser, and often an autoencoder and text encoders, by the names of the code that it was trained
with, which diffusers translates. Configurations, tokenizers, the scheduler and networks that it lacks are those of the
model that it was made from, its base.
"""

import inspect
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from obsdiff import checkpoint, folders, turns
from obsdiff.checkpoint import DEFAULTS, INDEX
from obsdiff.configs import read_family, read_index
from obsdiff.folders import check_free, new_folder
from obsdiff.hub import fetch_configs, fetch_pipeline
from obsdiff.loading import local_path
from obsdiff.manifest import read_json
from obsdiff.weights import CONVERT, main_dtype
from obsdiff_export.resources import require_disk, require_memory
from obsdiff_runtime.errors import ConfigError, ModelError, failure, first_line

_DENOISER: Final = ("model.diffusion_model.", "diffusion_model.")
_AUTOENCODER: Final = ("first_stage_model.", "vae.")
_CLIP: Final = (
    ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    ("conditioner.embedders.1.", "text_encoders.clip_g."),
)
_T5: Final = ("text_encoders.t5xxl.",)
_ENCODERS: Final = (*_CLIP[0], *_CLIP[1], *_T5)

_ADAPTERS: Final = ("lora_", ".lora.")
_SCALED: Final = (".scale_weight", ".weight_scale", ".comfy_quant", ".absmax", "scaled_fp8")
_NARROW: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_TOLD: Final[Mapping[str, Mapping[str, Any]]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
"""Empty tensors by which a Stable Diffusion file says what its UNet predicts, and of which noise."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A diffusers folder made of a single file and its base.

    Attributes:
        output: the folder.
        taken: components that came from the file, the denoiser first, or from two files.
        copied: those that came from the base.
        dtype: of the denoiser's weights, of two of the first's.
        told: settings of the scheduler that the file asks for.
        left_out: tensors of the file that belong to none of its components, moving averages among them.
    """

    output: Path
    taken: tuple[str, ...]
    copied: tuple[str, ...]
    dtype: str
    told: tuple[str, ...]
    left_out: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}


def convert(
    file: Path | str,
    base: Path | str,
    output: Path | str,
    *,
    second: Path | str | None = None,
    revision: str | None = None,
) -> Converted:
    """Writes a diffusers folder of a model that is a single file.

    Args:
        file: safetensors, in diffusers' names or in those of a layout that diffusers reads; where denoisers take turns
            that of the first, of high noise.
        base: the model that it was made from: a diffusers folder, or the id of a model on the Hub, of which only what
            the file lacks is fetched.
        output: folder to create.
        second: the file of the denoiser that takes its turn behind the first, of low noise.
        revision: of the base on the Hub.

    Raises:
        ModelError: it is no such file, a LoRA, or quantised, or does not fit the base; or there is no such base.
        ConfigError: the output exists, the base is pruned, or it has more denoisers than there are files, or fewer.
        ResourceError: memory or disk are too small.
    """
    output = Path(output)
    files = [Path(each).expanduser() for each in (file, second) if each is not None]
    held = [_names(path) for path in files]
    check_free(output, force=False)
    here = local_path(base)
    described = here or fetch_configs(str(base), revision=revision, local_files_only=False)
    index = read_index(described)
    denoisers = turns.names(index, read_family(described, index))
    if checkpoint.pruned_manifest(described) is not None:
        raise ConfigError(f"--base {base}: it is pruned; name the dense model that {files[0].name} was made from")
    if len(files) != len(denoisers):
        each = "give a file of each, with --second that of low noise" if second is None else "leave --second out"
        raise ConfigError(f"--base {base} has {' and '.join(denoisers)}: {each}")
    places = {
        component: (path, names, prefix)
        for path, names, denoiser in zip(files, held, denoisers, strict=True)
        for component, prefix in _prefixes(names, index, denoiser).items()
    }
    folder = here or fetch_pipeline(
        str(base), revision=revision, variant=None, local_files_only=False, without=tuple(places)
    )
    sizes = [path.stat().st_size for path in files]
    require_memory(max(sizes), advice="a whole file is read; close what else is running")
    require_disk(output, sum(sizes))
    present = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    copied = tuple(name for name in present if name not in places)
    with new_folder(output) as partial:
        for component in copied:
            _copy(folder / component, partial / component)
        for component, (path, names, prefix) in places.items():
            with _named(path, component, base):
                module = _network(path, names, prefix, index[component], folder / component)
            checkpoint.save_component(module, partial / component)
            if component == denoisers[0]:
                dtype = str(main_dtype(module)).removeprefix("torch.")
            del module  # before there is the next
        told = _tell(partial / "scheduler" / "scheduler_config.json", held[0])
        for name in (INDEX, DEFAULTS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
    known = tuple(prefix for _, _, prefix in places.values())
    return Converted(
        output=output,
        taken=tuple(places),
        copied=copied,
        dtype=dtype,
        told=told,
        left_out=sum(name not in _TOLD and not name.startswith(known) for names in held for name in names),
    )


def _names(path: Path) -> list[str]:
    """Of the tensors in a file.

    Raises:
        ModelError: it is no file of a model's weights.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if path.suffix == ".gguf":
        raise ModelError(f"{path}: GGUF files hold quantised weights; take the safetensors file of 16 bits")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is no safetensors file; {CONVERT}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: it is truncated or no safetensors file: {first_line(error)}") from None
    if any(part in name for name in names for part in _ADAPTERS):
        raise ModelError(f"{path} is a LoRA, no model: obsdiff lora brings it to a pruned one")
    scaled = next((name for name in names if name.endswith(_SCALED)), None)
    if scaled is not None:
        raise ModelError(f"{path} is quantised ({scaled}); take the file of 16 bits, and quantise with --precision")
    return names


def _prefixes(names: Sequence[str], index: Mapping[str, Any], denoiser: str) -> dict[str, str]:
    """For each component that the file holds, the denoiser first, what its tensors' names begin with."""

    def used(prefixes: Sequence[str]) -> str | None:
        return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)

    own = used(_DENOISER)
    if own is None:  # it holds nothing else
        return {denoiser: ""}
    encoders = [name for name in index if name.startswith("text_encoder") and index[name][0] is not None]
    clips = [name for name in encoders if index[name][1].startswith("CLIPText")]
    places = {"vae": _AUTOENCODER, **dict(zip(clips, _CLIP, strict=False))}
    places |= {name: _T5 for name in encoders if index[name][1].startswith("T5")}
    found = {component: used(prefixes) for component, prefixes in places.items() if component in index}
    return {denoiser: own} | {component: prefix for component, prefix in found.items() if prefix is not None}


def _network(path: Path, names: Sequence[str], prefix: str, entry: Sequence[str], config: Path) -> nn.Module:
    """A component with the file's weights; what diffusers and torch raise of a file that does not fit is passed on.

    Args:
        path: the file.
        names: of its tensors.
        prefix: of the component's.
        entry: library and class.
        config: the component's folder in the base.
    """
    library, kind = entry
    read = _ENCODERS if library == "transformers" else prefix  # diffusers tells encoders apart by the others
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in names if name.startswith(read)}
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    dtype = max(own.values(), key=Tensor.numel).dtype
    if dtype in _NARROW:
        dtype = torch.bfloat16
    if not dtype.is_floating_point:
        raise SingleFileComponentError("its weights are integers: it is quantised")
    if library == "diffusers":
        with init_empty_weights(include_buffers=False):
            module: nn.Module = getattr(diffusers, kind).from_config(read_json(config / "config.json", ModelError))
        if own.keys() == module.state_dict().keys():
            wide = {name: tensor.to(dtype) if tensor.dtype in _NARROW else tensor for name, tensor in own.items()}
            module.load_state_dict(wide, strict=True, assign=True)
            return module
    if kind == "UNet2DConditionModel":
        tensors = {_DENOISER[0] + name: tensor for name, tensor in own.items()}
    elif prefix in _DENOISER:
        tensors = own
    try:
        module = load_single_file_sub_model(
            library,
            kind,
            config.name,
            tensors,
            pipelines,
            hasattr(pipelines, library),
            str(config.parent),
            local_files_only=True,
            torch_dtype=dtype,
        )
    except NotImplementedError:  # torch's, where a weight is still on the meta device
        raise SingleFileComponentError("some of its weights are missing") from None
    return module


@contextmanager
def _named(path: Path, component: str, base: Path | str) -> Iterator[None]:
    """Says in one sentence what does not fit: diffusers looks tensors up, cuts them and copies them."""
    try:
        yield
    except (SingleFileComponentError, LookupError, ValueError, RuntimeError, AttributeError, OSError) as error:
        if failure(error) is not None:  # of memory or a disk, which says itself what is wrong
            raise
        what = first_line(error).partition(". If you want")[0]  # diffusers' advice is for who calls it
        raise ModelError(
            f"{path} holds no {component} of {base}; is that what it was made from? diffusers says: {what}"
        ) from error


def _copy(source: Path, target: Path) -> None:
    """A component of the base, file by file."""
    if not source.is_dir():
        raise ModelError(f"{source}: there is no such folder; is the base complete?")
    files, others = folders.component_files(source)
    if not files and (source / "config.json").is_file():  # it is a network
        raise ModelError(f"{source} holds no weights as safetensors, or of a variant only; {CONVERT}")
    folders.copy_all([*files, *others], target)


def _tell(config: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Writes into a scheduler's configuration what the file says of it; which settings those are."""
    changes = {key: value for name in names for key, value in _TOLD.get(name, {}).items()}
    if changes:
        scheduler = read_json(config, ModelError)["_class_name"]
        known = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
        unknown = sorted(changes.keys() - known.keys())
        if unknown:
            raise ModelError(f"the file asks for {unknown[0]}, and the base's {scheduler} has none; take another base")
        checkpoint.rewrite_config(config, **changes)
    return tuple(changes)
