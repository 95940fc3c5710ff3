"""Autoencoders of films (Wan) as they are exported: decoders that go from one latent frame to the next.

    b         batch
    h, w      sides of the latents
    s         VAE scale: pixels per side of a latent pixel

A film is decoded one latent frame at a time. The first becomes one frame, each of the others FRAME_SCALE. Convolutions
over time look at the two frames before their own: these are the caches, which a call gives and the next one takes, so
that a film of any length needs the memory of one latent frame.

diffusers' first caches hold fewer frames, or none, and it pads with zeros what is missing. Here all hold two, zeros
among them, so that every call but the first is the same graph.

Names of inputs and outputs are those of optimum's ONNX folders where it has such. Networks keep the names of their
weights.
"""

from collections.abc import Sequence
from functools import partial
from inspect import Parameter, Signature
from typing import Any, Final

import torch
from torch import Tensor, nn

from obsdiff.families.parts import config_of, latent_sizes, noise, rows, view
from obsdiff_export.component import Component
from obsdiff_runtime.autoencoder import FRAME_SCALE, cached, vae_scale
from obsdiff_runtime.bundle import DECODER, NEXT_DECODER
from obsdiff_runtime.errors import ModelError

CLASS: Final = "AutoencoderKLWan"


class _First(nn.Module):
    """The first latent frame (b, channels, h, w) to pixels (b, 3, 1, h s, w s) and caches (b, c, 2, ...)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = _resizing(vae.decoder)
        self.patch = vae.config.patch_size or 1

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        found: list[Any] = [None] * sum(1 for _ in self.decoder.modules())  # more than there are convolutions
        place = [0]
        unseen: dict[int, Tensor] = {}

        def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            unseen[kwargs["feat_idx"][0]] = torch.zeros_like(args[0])  # passed over by the first frame

        doubling = [module for module in self.decoder.modules() if getattr(module, "mode", None) == "upsample3d"]
        hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in doubling]
        latents = self.post_quant_conv(latent_sample[:, :, None])
        try:
            pixels = self.decoder(latents, feat_cache=found, feat_idx=place, first_chunk=True)
        finally:
            for hook in hooks:
                hook.remove()
        seen = [unseen.get(index, found[index]) for index in range(place[0])]  # (b, c, 1, ...) each
        caches = [torch.cat([torch.zeros_like(frame), frame], dim=2) for frame in seen]
        return (_whole(pixels, self.patch), *caches)


class _Next(nn.Module):
    """A further latent frame (b, channels, h, w) and caches to pixels (b, 3, FRAME_SCALE, h s, w s) and new caches."""

    def __init__(self, vae: Any, caches: int) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = _resizing(vae.decoder)
        self.patch = vae.config.patch_size or 1
        named = ("latent_sample", *map(cached, range(caches)))
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in named]
        self.forward = partial(self._decode)
        self.forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # torch.export asks for names

    def _decode(self, latent_sample: Tensor, **caches: Tensor) -> tuple[Tensor, ...]:
        kept = [caches[cached(index)] for index in range(len(caches))]
        latents = self.post_quant_conv(latent_sample[:, :, None])
        pixels = self.decoder(latents, feat_cache=kept, feat_idx=[0])
        return (_whole(pixels, self.patch), *kept)


def decoders(vae: Any, *, height: int, width: int) -> list[Component]:
    """Two: of a film's first latent frame, and of each of the others.

    Raises:
        ModelError: it makes another number of frames of a latent frame.
    """
    config, dtype = config_of(vae), vae.dtype
    if 2 ** sum(config["temperal_downsample"]) != FRAME_SCALE:
        raise ModelError(f"this {CLASS} makes a latent frame of another number of frames than {FRAME_SCALE}")
    scale = vae_scale(config)
    latents = [
        noise(batch, config["z_dim"], *size, dtype=dtype)
        for batch, _, size in rows(latent_sizes(height, width, vae_scale=scale, multiple=1))
    ]
    with torch.device("meta"):
        empty = _First(type(vae).from_config(vae.config))
    shapes = [[cache.shape for cache in empty(latent.to("meta"))[1:]] for latent in latents]
    later = [
        {"latent_sample": latent, **{cached(k): noise(*shape, dtype=dtype) for k, shape in enumerate(found)}}
        for latent, found in zip(latents, shapes, strict=True)
    ]
    axes = {0: "batch", 2: "height", 3: "width"}
    first = Component(
        name=DECODER,
        module=_First(vae).eval(),
        inputs={"latent_sample": latents[0]},
        dynamic_axes={"latent_sample": axes},
        outputs=("sample", *(cached(k, given=True) for k in range(len(shapes[0])))),
        config=config,
        more_inputs=tuple({"latent_sample": latent} for latent in latents[1:]),
    )
    following = Component(
        name=NEXT_DECODER,
        module=_Next(vae, len(shapes[0])).eval(),
        inputs=later[0],
        dynamic_axes={
            "latent_sample": axes,
            **{cached(k): _axes(shape, latents[0].shape) for k, shape in enumerate(shapes[0])},
        },
        outputs=first.outputs,
        config=config,
        more_inputs=tuple(later[1:]),
    )
    return [first, following]


def _whole(pixels: Tensor, patch: int) -> Tensor:
    """Patches (b, 3 patch patch, f, h, w), as Wan 2.2 TI2V's decoder gives them, columns before rows, side by side."""
    if patch == 1:
        return pixels
    split = pixels.unflatten(1, (-1, patch, patch))  # type: ignore[no-untyped-call]  # (b, 3, columns, rows, f, h, w)
    whole: Tensor = split.permute(0, 1, 4, 5, 3, 6, 2).flatten(5).flatten(3, 4)
    return whole


def _resizing(module: nn.Module) -> Any:
    """A view that doubles pictures by "nearest", a Resize in ONNX; "nearest-exact" does the same, by gathers."""
    if isinstance(module, nn.Upsample):
        seen = view(module)
        seen.mode = "nearest"
        return seen
    return view(module, **{name: _resizing(child) for name, child in module.named_children()})


def _axes(cache: Sequence[int], latent: Sequence[int]) -> dict[int, str]:
    """Of a cache (b, c, 2, h t, w t): "height_x4" where t is 4."""
    times = cache[-1] // latent[-1]
    suffix = "" if times == 1 else f"_x{times}"
    return {0: "batch", 3: f"height{suffix}", 4: f"width{suffix}"}
