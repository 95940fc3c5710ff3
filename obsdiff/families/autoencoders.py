"""Autoencoders as they are exported.

    b         batch
    h, w      sides of the latent image
    s         VAE scale: pixels per side of a latent pixel

Names of inputs and outputs are those of optimum's ONNX folders. Networks keep the names of their weights.
"""

from typing import Any, Final

from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from obsdiff.families import Family, films, references
from obsdiff.families.parts import config_of, latent_sizes, noise, rows
from obsdiff_export.component import Component
from obsdiff_runtime.autoencoder import latent_channels, tile_overlap, vae_scale
from obsdiff_runtime.bundle import DECODER
from obsdiff_runtime.errors import ModelError

PATCH: Final = 2
"""Latent pixels per side of a patch of FLUX.2's autoencoder; its pipelines fix it."""

AUTOENCODERS: Final = (
    "AutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKLFlux2",
    "AutoencoderKLQwenImage",
    films.CLASS,
    films.WHOLE,
)


def vae_scale_of(pipeline: DiffusionPipeline, family: Family) -> int:
    """Pixels per side of a latent pixel; the family's where the pipeline has no VAE."""
    vae = getattr(pipeline, "vae", None)
    return family.vae_scale if vae is None else vae_scale(vae.config)


class _Decoder(nn.Module):
    """Latents (b, channels, h, w) to pixels (b, 3, h s, w s); of an autoencoder of films the first frame.

    Those of AutoencoderKLFlux2 are patches, and of unit variance.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.bn = getattr(vae, "bn", None)
        self.decoder = vae.decoder
        self._films = draws_films(vae)

    def forward(self, latent_sample: Tensor) -> Tensor:
        if self.bn is not None:
            mean, deviation = _statistics(self.bn)
            latent_sample = pixel_shuffle(latent_sample * deviation + mean, PATCH)
        latents = latent_sample[:, :, None] if self._films else latent_sample
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixels: Tensor = self.decoder(latents)
        return pixels[:, :, 0] if self._films else pixels


class _Encoder(nn.Module):
    """Pixels (b, 3, h s, w s) to the posterior's mean and log-variance, (b, 2 channels, h, w).

    AutoencoderDC has no posterior and gives the latents, (b, channels, h, w); AutoencoderKLFlux2 gives those of the
    mean, as its pipelines read it. Of an autoencoder of films the first frame.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = getattr(vae, "quant_conv", None)
        self.bn = getattr(vae, "bn", None)
        self._films = draws_films(vae)

    def forward(self, sample: Tensor) -> Tensor:
        parameters: Tensor = self.encoder(sample[:, :, None] if self._films else sample)
        if self.quant_conv is not None:
            parameters = self.quant_conv(parameters)
        if self.bn is not None:
            mean, deviation = _statistics(self.bn)
            return (pixel_unshuffle(parameters.chunk(2, dim=1)[0], PATCH) - mean) / deviation
        return parameters[:, :, 0] if self._films else parameters


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of patches of latents, (channels, 1, 1) each."""
    if norm.running_mean is None or norm.running_var is None:
        raise ModelError("the vae keeps no statistics of its latents; load it as its configuration says")
    return norm.running_mean[:, None, None], (norm.running_var[:, None, None] + norm.eps).sqrt()


def use_tiles(vae: Any, side: int) -> None:
    """Changes a VAE of diffusers: pictures go through it in tiles of so many pixels a side, as the runtime does."""
    config = config_of(vae)
    if hasattr(vae, "tile_overlap_factor"):
        patch = PATCH if hasattr(vae, "bn") else 1
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // vae_scale(config) * patch
        return
    stride = side - tile_overlap(side, config)
    sides = {f"tile_sample_{of}": pixels for of, pixels in (("min", side), ("stride", stride))}
    vae.enable_tiling(**{f"{name}_{axis}": value for name, value in sides.items() for axis in ("height", "width")})


def draws_films(vae: Any) -> bool:
    """Whether pictures are films of one frame to it."""
    return type(vae).__name__ == "AutoencoderKLQwenImage"


def autoencoder(pipeline: DiffusionPipeline, *, height: int, width: int) -> list[Component]:
    """The VAE's decoder and encoder, of films the decoder alone unless they begin with a picture; none without VAE.

    Raises:
        ModelError: it is none of AUTOENCODERS.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return []
    if type(vae).__name__ not in AUTOENCODERS:
        raise ModelError(f"the vae is a {type(vae).__name__}; known are {', '.join(AUTOENCODERS)}")
    if type(vae).__name__ == films.CLASS:
        reads = []
        if references.masks_frames(type(pipeline).__name__, pipeline.config):
            reads = [films.picture_encoder(vae, height=height, width=width)]
        elif references.opens(type(pipeline).__name__):
            reads = films.encoders(vae, height=height, width=width)
        return [*films.decoders(vae, height=height, width=width), *reads]
    if type(vae).__name__ == films.WHOLE:
        reads = [films.picture_encoder(vae, height=height, width=width)]
        return [films.whole_decoder(vae, height=height, width=width), *reads]
    scale, dtype, config = vae_scale(vae.config), vae.dtype, config_of(vae)
    channels = vae.bn.num_features if hasattr(vae, "bn") else latent_channels(config)
    sizes = rows(latent_sizes(height, width, vae_scale=scale, multiple=1))
    colours = config.get("in_channels") or config["input_channels"]
    latents = [noise(b, channels, h, w, dtype=dtype) for b, _, (h, w) in sizes]
    pixels = [noise(b, colours, h * scale, w * scale, dtype=dtype) for b, _, (h, w) in sizes]
    decoder = Component(
        name=DECODER,
        module=_Decoder(vae).eval(),
        inputs={"latent_sample": latents[0]},
        dynamic_axes={"latent_sample": {0: "batch", 2: "height", 3: "width"}},
        outputs=("sample",),
        config=config,
        more_inputs=tuple({"latent_sample": example} for example in latents[1:]),
    )
    encoder = Component(
        name="vae_encoder",
        module=_Encoder(vae).eval(),
        inputs={"sample": pixels[0]},
        dynamic_axes={"sample": {0: "batch", 2: "image_height", 3: "image_width"}},
        outputs=("latent_parameters",),
        config=config,
        more_inputs=tuple({"sample": example} for example in pixels[1:]),
    )
    return [decoder, encoder]
