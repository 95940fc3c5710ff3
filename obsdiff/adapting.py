"""`obsdiff lora`: a LoRA of the dense model brought to a pruned one."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from obsdiff import adapters, checkpoint, turns
from obsdiff.folders import check_free
from obsdiff.loading import load_configs
from obsdiff.manifest import read_manifest
from obsdiff_runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A LoRA that was brought to a pruned model; of denoisers that take turns, theirs together.

    Attributes:
        output: a safetensors file, or a folder.
        files: what was written, by denoiser; none where it is a folder.
        layers: of the denoisers that it changes.
        cut: of them, layers whose widths or channels are other ones now.
        masked: of them, layers whose pattern of zeros was kept; none in a file.
        left_out: tensors for other networks that were not merged.
        unchanged: denoisers that no LoRA was given for.
    """

    output: Path
    files: Mapping[str, Path]
    layers: int
    cut: int
    masked: int
    left_out: int
    unchanged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        files = {name: str(path) for name, path in self.files.items()}
        return {**dataclasses.asdict(self), "output": str(self.output), "files": files}


def lora(
    pruned: Path | str,
    adapter: Path | str | None,
    output: Path | str,
    *,
    second: Path | str | None = None,
    strength: float = 1.0,
    force: bool = False,
) -> Adapted:
    """A LoRA of the dense model for a pruned one.

    Args:
        pruned: a folder that `save` or `obsdiff prune` wrote.
        adapter: the LoRA's safetensors file; where denoisers take turns that of the first, of high noise, if any.
        output: NAME.safetensors: the LoRA, cut, for load_lora_weights() of the pipeline that `load` gives, and that of
            a second denoiser as NAME_2.safetensors, to be loaded with load_into_transformer_2=True; a folder: the
            checkpoint with the LoRA merged into its denoisers, their zeros still zeros.
        second: the file of the denoiser that takes its turn behind the first, of low noise.
        strength: of the LoRA.
        force: replace an earlier result.

    Raises:
        ModelError: it is no LoRA, or one of another model.
        ConfigError: the output exists, or a LoRA is for a denoiser that is not there, or for the other one.
        BundleError: `pruned` is no pruned checkpoint.
    """
    folder, output = Path(pruned), Path(output)
    checkpoint.require_manifest(folder)
    configs = load_configs(folder)
    index, first = configs.configs["model_index"], configs.family.denoiser
    names = turns.names(index, configs.family)
    given = adapters.assigned(names, adapter, second)
    files: dict[str, Path] = {}
    if output.suffix == ".safetensors":
        files = {name: output.with_stem(output.stem + name.removeprefix(first)) for name in given}
        for path in files.values():
            if path.exists() and not force:
                raise ConfigError(f"{path} exists; choose another name or replace it with --force")
    else:
        check_free(output, force=force)
    manifests = {name: read_manifest(folder / name) for name in names}
    with torch.device("meta"):
        dense = type(configs.denoiser).from_config(configs.configs[first])  # type: ignore[attr-defined]
    whole = {name: adapters.read(path, index["_class_name"], first) for name, path in given.items()}
    found = {name: adapters.cut(each, dense, configs.family, manifests[name]) for name, each in whole.items()}
    masked = 0
    if files:
        output.parent.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            adapters.write(found[name], path, first, strength=strength)
    else:
        pipeline = checkpoint.load(folder)
        for name, each in found.items():
            masked += adapters.merge(getattr(pipeline, name), each, manifests[name], strength=strength)
        behind = {name: manifests[name] for name in names[1:]}
        denoiser = getattr(pipeline, first)
        checkpoint.save(pipeline, denoiser, output, manifests[first], behind=behind, source=folder, force=force)
    pairs = [(found[name].deltas[layer], delta) for name, each in whole.items() for layer, delta in each.deltas.items()]
    return Adapted(
        output=output,
        files=files,
        layers=len(pairs),
        cut=sum(after.up is not before.up or after.down is not before.down for after, before in pairs),
        masked=masked,
        left_out=0 if files else sum(len(each.others) for each in whole.values()),
        unchanged=tuple(name for name in names if name not in given),
    )
