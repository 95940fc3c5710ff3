"""Autoencoders of films as they are exported.

    b         batch
    f         latent frames
    h, w      sides of the latents
    s         VAE scale: pixels per side of a latent pixel

LTX-Video's decodes a film whole: its convolutions look at frames behind their own, too.

Wan's goes from one latent frame to the next. The first becomes one frame, each of the others FRAME_SCALE. Convolutions
over time look at the two frames before their own: these are the caches, which a call gives and the next one takes, so
that a film of any length needs the memory of one latent frame.

diffusers' first caches hold fewer frames, or none, and it pads with zeros what is missing. Here all hold two, zeros
among them, so that every call but the first is the same graph. A film is encoded likewise; convolutions that halve the
frames look at one frame before their own, and their caches hold it alone.

Names of inputs and outputs are those of optimum's ONNX folders where it has such. Networks keep the names of their
weights.
"""

from collections.abc import Sequence
from functools import partial
from inspect import Parameter, Signature
from typing import Any, Final

import torch
from torch import Tensor, nn

from obsdiff.families import ltx
from obsdiff.families.parts import config_of, latent_sizes, noise, rows, view
from obsdiff_export.component import Component
from obsdiff_runtime.autoencoder import FRAME_SCALE, cached, frame_scale, pixel_patch, vae_scale
from obsdiff_runtime.bundle import DECODER, ENCODER, NEXT_DECODER, NEXT_ENCODER
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds.ltx import FRAME_SCALE as FRAME_SCALE_LTX

CLASS: Final = "AutoencoderKLWan"
WHOLE: Final = "AutoencoderKLLTXVideo"

_FRAMES: Final = (3, 2, 4)  # of the latents of examples


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
        _take_caches(self, "latent_sample", caches)

    def run(self, latent_sample: Tensor, **caches: Tensor) -> tuple[Tensor, ...]:
        kept = [caches[cached(index)] for index in range(len(caches))]
        latents = self.post_quant_conv(latent_sample[:, :, None])
        pixels = self.decoder(latents, feat_cache=kept, feat_idx=[0])
        return (_whole(pixels, self.patch), *kept)


class _Read(nn.Module):
    """A picture (b, 3, H, W) to a mean and log-variance (b, 2 channels, h, w)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, getattr(vae, "quant_conv", nn.Identity())
        self.patch = pixel_patch(config_of(vae))

    def forward(self, sample: Tensor) -> Tensor:
        parameters: Tensor = self.quant_conv(self.encoder(_patches(sample[:, :, None], self.patch)))
        return parameters[:, :, 0]


class _FirstRead(nn.Module):
    """The first frame (b, 3, H, W) to a mean and log-variance (b, 2 channels, h, w), and caches (b, c, 1 or 2, ...)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        found: list[Any] = [None] * sum(1 for _ in self.encoder.modules())  # more than there are convolutions
        place = [0]
        halving: set[int] = set()

        def see(_: nn.Module, __: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            halving.add(kwargs["feat_idx"][0])

        modules = [module for module in self.encoder.modules() if getattr(module, "mode", None) == "downsample3d"]
        hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
        try:
            parameters = self.quant_conv(self.encoder(sample[:, :, None], feat_cache=found, feat_idx=place))
        finally:
            for hook in hooks:
                hook.remove()
        caches = [
            frame if index in halving else torch.cat([torch.zeros_like(frame), frame], dim=2)
            for index, frame in enumerate(found[: place[0]])  # (b, c, 1, ...) each
        ]
        return (parameters[:, :, 0], *caches)


class _NextRead(nn.Module):
    """Further frames (b, 3, FRAME_SCALE, H, W) and caches to what they make as one latent frame, and new caches."""

    def __init__(self, vae: Any, caches: int) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        _take_caches(self, "sample", caches)

    def run(self, sample: Tensor, **caches: Tensor) -> tuple[Tensor, ...]:
        kept = [caches[cached(index)] for index in range(len(caches))]
        parameters = self.quant_conv(self.encoder(sample, feat_cache=kept, feat_idx=[0]))
        return (parameters[:, :, 0], *kept)


def _take_caches(module: Any, name: str, caches: int) -> None:
    """Changes a module: its forward takes `name` and so many caches to its `run`. torch.export asks for their names."""
    named = (name, *map(cached, range(caches)))
    parameters = [Parameter(each, Parameter.POSITIONAL_OR_KEYWORD) for each in named]
    module.forward = partial(module.run)
    module.forward.__signature__ = Signature(parameters)


class _Whole(nn.Module):
    """A film's latents (b, channels, f, h, w) to pixels (b, 3, 1 + (f - 1) t, h s, w s), t frames of a latent frame.

    A decoder that is told how noisy latents are is told that they are not, as diffusers' calls do by default.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.told = bool(vae.config.timestep_conditioning)

    def forward(self, latent_sample: Tensor) -> Tensor:
        clean = torch.zeros_like(latent_sample[:, 0, 0, 0, 0]) if self.told else None
        pixels: Tensor = self.decoder(latent_sample, clean)
        return pixels


def whole_decoder(vae: Any, *, height: int, width: int) -> Component:
    """Of all frames of a film. Its configuration has means and deviations of the latents, too, where weights are there.

    Raises:
        ModelError: it adds noise while it decodes, or is of another scale than LTX-Video's.
    """
    latents = _film_examples(vae, height, width)
    return Component(
        name=DECODER,
        module=_Whole(vae).eval(),
        inputs={"latent_sample": latents[0]},
        dynamic_axes={"latent_sample": {0: "batch", 2: "frames", 3: "height", 4: "width"}},
        outputs=("sample",),
        config=_whole_config(vae),
        more_inputs=tuple({"latent_sample": example} for example in latents[1:]),
    )


def _whole_config(vae: Any) -> dict[str, Any]:
    known = () if vae.latents_mean.is_meta else ("latents_mean", "latents_std")
    return {**config_of(vae), **{name: getattr(vae, name).tolist() for name in known}}


def _film_examples(vae: Any, height: int, width: int) -> list[Tensor]:
    """Latents (b, channels, f, h, w) of three sizes, of an autoencoder that decodes films whole."""
    config, scale = config_of(vae), vae_scale(vae.config)
    if any(config["decoder_inject_noise"]):
        raise ModelError(f"this {WHOLE} adds noise while it decodes, as that of LTX-Video 0.9.1, which is not exported")
    if (scale, frame_scale(config)) != (ltx.SIDE, FRAME_SCALE_LTX):
        raise ModelError(
            f"this {WHOLE} makes a latent pixel of {scale} pixels a side, and a latent frame of {frame_scale(config)} "
            f"frames; LTX-Video's are of {ltx.SIDE} and {FRAME_SCALE_LTX}"
        )
    sizes = latent_sizes(height, width, vae_scale=scale, multiple=1)
    return [
        noise(batch, config["latent_channels"], frames, *size, dtype=vae.dtype)
        for frames, (batch, _, size) in zip(_FRAMES, rows(sizes), strict=True)
    ]


def decoders(vae: Any, *, height: int, width: int) -> list[Component]:
    """Two: of a film's first latent frame, and of each of the others.

    Raises:
        ModelError: it makes another number of frames of a latent frame.
    """
    latents = _examples(vae, height, width)
    ports = ("latent_sample", "sample")
    return _pair((DECODER, NEXT_DECODER), vae, (_First, _Next), ports, (latents, latents), unit=latents[0].shape[-1])


def encoders(vae: Any, *, height: int, width: int) -> list[Component]:
    """Two: of a film's first frame, and of each FRAME_SCALE further ones.

    Raises:
        ModelError: as of `decoders`, or its pixels are patches.
    """
    if vae.config.patch_size:
        raise ModelError(f"this {CLASS} reads patches of pixels, and obsdiff knows films that begin with one of others")
    latents, scale = _examples(vae, height, width), vae_scale(vae.config)
    first, later = (
        [noise(len(each), 3, *more, *(side * scale for side in each.shape[-2:]), dtype=vae.dtype) for each in latents]
        for more in ((), (FRAME_SCALE,))
    )
    names, ports = (ENCODER, NEXT_ENCODER), ("sample", "latent_parameters")
    return _pair(names, vae, (_FirstRead, _NextRead), ports, (first, later), unit=latents[0].shape[-1])


def picture_encoder(vae: Any, *, height: int, width: int) -> Component:
    """Of a film's first frame alone.

    Raises:
        ModelError: as of `decoders`, or `whole_decoder`.
    """
    whole, scale = type(vae).__name__ == WHOLE, vae_scale(vae.config)
    latents = (_film_examples if whole else _examples)(vae, height, width)
    pixels = [noise(len(each), 3, *(side * scale for side in each.shape[-2:]), dtype=vae.dtype) for each in latents]
    return Component(
        name=ENCODER,
        module=_Read(vae).eval(),
        inputs={"sample": pixels[0]},
        dynamic_axes={"sample": _axes(pixels[0].shape, latents[0].shape[-1])},
        outputs=("latent_parameters",),
        config=_whole_config(vae) if whole else config_of(vae),
        more_inputs=tuple({"sample": each} for each in pixels[1:]),
    )


def _examples(vae: Any, height: int, width: int) -> list[Tensor]:
    """Latents (b, channels, h, w) of three sizes."""
    config = config_of(vae)
    if 2 ** sum(config["temperal_downsample"]) != FRAME_SCALE:
        raise ModelError(f"this {CLASS} makes a latent frame of another number of frames than {FRAME_SCALE}")
    sizes = latent_sizes(height, width, vae_scale=vae_scale(config), multiple=1)
    return [noise(batch, config["z_dim"], *size, dtype=vae.dtype) for batch, _, size in rows(sizes)]


def _pair(
    names: tuple[str, str],
    vae: Any,
    modules: tuple[Any, Any],
    ports: tuple[str, str],
    examples: tuple[Sequence[Tensor], Sequence[Tensor]],
    *,
    unit: int,
) -> list[Component]:
    """A network of the first frame, and that of those behind it, which is told the caches that either gives.

    Args:
        names: of the components.
        vae: whose they are.
        modules: that make them, told the VAE, and the second one how many caches there are.
        ports: input and output beside the caches.
        examples: of that input, of either.
        unit: width of the first example's latents.
    """
    (told, given), config, dtype = ports, config_of(vae), vae.dtype
    with torch.device("meta"):
        empty = modules[0](type(vae).from_config(vae.config))
    shapes = [[cache.shape for cache in empty(example.to("meta"))[1:]] for example in examples[0]]
    later = [
        {told: example, **{cached(k): noise(*shape, dtype=dtype) for k, shape in enumerate(found)}}
        for example, found in zip(examples[1], shapes, strict=True)
    ]
    same: Any = {"outputs": (given, *(cached(k, given=True) for k in range(len(shapes[0])))), "config": config}
    first = Component(
        name=names[0],
        module=modules[0](vae).eval(),
        inputs={told: examples[0][0]},
        dynamic_axes={told: _axes(examples[0][0].shape, unit)},
        more_inputs=tuple({told: example} for example in examples[0][1:]),
        **same,
    )
    following = Component(
        name=names[1],
        module=modules[1](vae, len(shapes[0])).eval(),
        inputs=later[0],
        dynamic_axes={name: _axes(example.shape, unit) for name, example in later[0].items()},
        more_inputs=tuple(later[1:]),
        **same,
    )
    return [first, following]


def _whole(pixels: Tensor, patch: int) -> Tensor:
    """Patches (b, 3 patch patch, f, h, w), as Wan 2.2 TI2V's decoder gives them, columns before rows, side by side."""
    if patch == 1:
        return pixels
    split = pixels.unflatten(1, (-1, patch, patch))  # type: ignore[no-untyped-call]  # (b, 3, columns, rows, f, h, w)
    whole: Tensor = split.permute(0, 1, 4, 5, 3, 6, 2).flatten(5).flatten(3, 4)
    return whole


def _patches(pixels: Tensor, patch: int) -> Tensor:
    """What `_whole` puts side by side."""
    split: Tensor = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # type: ignore[no-untyped-call]
    return split.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)  # of (b, 3, f, h, rows, w, columns)


def _resizing(module: nn.Module) -> Any:
    """A view that doubles pictures by "nearest", a Resize in ONNX; "nearest-exact" does the same, by gathers."""
    if isinstance(module, nn.Upsample):
        seen = view(module)
        seen.mode = "nearest"
        return seen
    return view(module, **{name: _resizing(child) for name, child in module.named_children()})


def _axes(shape: Sequence[int], unit: int) -> dict[int, str]:
    """Of something (b, ..., h t, w t): "height_x4" where t is 4; `unit` is w of the latents."""
    times, sides = shape[-1] // unit, len(shape) - 2
    suffix = "" if times == 1 else f"_x{times}"
    return {0: "batch", sides: f"height{suffix}", sides + 1: f"width{suffix}"}
