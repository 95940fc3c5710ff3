"""What of a pipeline is exported."""

from diffusers import DiffusionPipeline
from torch import nn

from obsdiff import turns
from obsdiff.families import Family, controls, fills, references, seeing
from obsdiff.families.autoencoders import autoencoder, vae_scale_of
from obsdiff.families.reading import image_encoders, text_encoders
from obsdiff_export.component import Component


def denoiser(pipeline: DiffusionPipeline, family: Family, module: nn.Module, *, height: int, width: int) -> Component:
    """A denoiser, as this pipeline calls it."""
    scale = vae_scale_of(pipeline, family)
    found = references.component(
        family,
        module,
        type(pipeline).__name__,
        height=height,
        width=width,
        vae_scale=scale,
        frame_mask=references.masks_frames(type(pipeline).__name__, pipeline.config),
    )
    return controls.component(fills.component(found, type(pipeline).__name__), module, pipeline, scale)


def components(family: Family, pipeline: DiffusionPipeline, *, height: int, width: int) -> tuple[Component, ...]:
    """Text and image encoders, denoisers, VAE decoders and encoders: what the pipeline has, as the export needs it.

    Example inputs are small; the last of `more_inputs` has the asked size in pixels, up to 256 a side.

    Raises:
        ModelError: a component of a class that is not known, or with inputs that are not exported.
    """
    denoisers = (
        denoiser(pipeline, each, getattr(pipeline, each.denoiser), height=height, width=width)
        for each in turns.families(pipeline, family)
    )
    return (
        *seeing.components(pipeline, text_encoders(pipeline)),
        *image_encoders(pipeline),
        *denoisers,
        *autoencoder(pipeline, height=height, width=width),
    )
