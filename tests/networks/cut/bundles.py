"""What `obsdiff export` leaves of a tiny pipeline, without engines."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kinds import never_traced_again
from networks.cut.pipelines import FILMS


def write_bundle(
    pipeline: Any, folder: Path, *, sparsity: str = "dense", like: Path | None = None, own: tuple[str, ...] = ()
) -> Path:
    """What `obsdiff export` leaves, without engines; `like` is a bundle of the same networks but for its `own`."""
    from obsdiff import turns
    from obsdiff.delivery import copy_rest
    from obsdiff.families import exporting
    from obsdiff.families.table import family_of
    from obsdiff_runtime.bundle import ComponentEntry, Defaults, Manifest, TensorEntry, open_bundle, write_manifest

    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    family = family_of(denoiser)
    components = {} if like is None else dict(open_bundle(like).manifest.components)
    own = own or (family.denoiser,)
    for name in components.keys() - set(own):
        shutil.copytree(like / name, folder / name)
    components = {name: entry for name, entry in components.items() if name not in own}
    side = _SIDES.get(family.name, 32)
    for component in exporting.components(family, pipeline, height=side, width=side):
        if component.name in components:
            continue
        others = _extremes(pipeline, denoiser) if component.name == family.denoiser else ()
        model = _exported(component, folder / component.name, others)
        inputs, outputs = (
            tuple(TensorEntry(name=port.name, dtype=port.dtype, shape=port.shape) for port in ports)
            for ports in (model.inputs, model.outputs)
        )
        components[component.name] = ComponentEntry(
            onnx=f"{component.name}/model.onnx", dtype=model.dtype, inputs=inputs, outputs=outputs
        )
    copy_rest(pipeline, folder)
    write_manifest(
        folder,
        Manifest(
            created_by="a test",
            family=family.name,
            pipeline_class=type(pipeline).__name__,
            sparsity=sparsity,
            defaults=Defaults(
                height=side,
                width=side,
                num_inference_steps=4,
                guidance_scale=3.0,
                num_frames=9 if family.name in FILMS else None,
                max_sequence_length=_longest(pipeline),
            ),
            components=components,
            turns=turns.of(pipeline, family) if len(turns.names(pipeline.config, family)) > 1 else {},
        ),
    )
    return folder


def _longest(pipeline: Any) -> int:
    """Text tokens; of a processor's, what is around the pictures counts, and beside an image encoder's it is fixed."""
    if hasattr(pipeline, "processor"):
        return 60
    return 5 if getattr(pipeline, "image_encoder", None) is None else 512


_SIDES: dict[str, int] = {"ltx": 64}
"""Pixels of what a bundle draws, where they are not 32."""

_EXPORTED: dict[tuple[str, int, frozenset[str]], Any] = {}
_EXTREMES: dict[str, tuple[tuple[int, ...], ...]] = {
    "auraflow": ((2, 2), (34, 34), (6, 20)),  # up to all of its grid
    "dit": ((16, 16),) * 3,
    "pixart": ((2, 2), (128, 128), (6, 100)),
    "sd3": ((2, 2), (16, 16), (6, 14)),
    "ltx": ((1, 1, 1), (3, 5, 14), (9, 10, 4)),
    "wan": ((1, 2, 2), (3, 6, 14), (9, 10, 4)),
}
"""Sizes of latents: the least, much, and lopsided."""


def _extremes(pipeline: Any, denoiser: Any) -> tuple[Any, ...]:
    """Further inputs that the denoiser's graph has to be right on: from one token of text and image up."""
    from obsdiff.families import controls, fills, references
    from obsdiff.families.table import family_of

    family, kind = family_of(denoiser), type(pipeline).__name__
    told: Any = references.masked if references.masks_frames(kind, pipeline.config) else dict
    if controls.steers(kind):
        told = partial(controls.told, scale=pipeline.vae_scale_factor, seeded=True)
    filling = fills.of(kind, denoiser.config)
    if filling is not None:
        told = partial(fills.split, kind=filling, config=denoiser.config)
    sizes = _EXTREMES.get(family.name, ((2, 2), (64, 64), (6, 50)))
    return tuple(
        told(
            {
                **family.example(denoiser, batch=batch, size=size, text_tokens=text, pixels=(64, 96)),
                **references.example(denoiser, kind, batch=batch, tokens=tokens),
            }
        )
        for batch, text, tokens, size in zip((1, 3, 2), (1, 66, 32), (0, 9, 1), sizes, strict=True)
    )


def _exported(component: Any, folder: Path, others: tuple[Any, ...]) -> Any:
    """An OnnxModel that computes what torch does; a network that was exported for another bundle is copied."""
    import torch

    from obsdiff_export.onnx import export
    from obsdiff_export.parity import compare

    # T5 is told what is padding in one pipeline and not in another; of Gemma-2 they read different layers
    ports = frozenset([*component.inputs, *component.outputs])
    key = (component.name.removesuffix("_2"), next(component.module.parameters()).data_ptr(), ports)
    if key not in _EXPORTED:
        with never_traced_again():
            _EXPORTED[key] = export(component, folder, dtype=torch.float32)
        compare(replace(component, more_inputs=component.more_inputs + others), _EXPORTED[key])
    else:
        shutil.copytree(_EXPORTED[key].path.parent, folder)
        (folder / "config.json").write_text(json.dumps(component.config))
    return _EXPORTED[key]
