"""What of a pipeline is exported."""

from diffusers import DiffusionPipeline
from torch import nn

from obsdiff.families import Family, references
from obsdiff.families.autoencoders import autoencoder, vae_scale_of
from obsdiff.families.reading import text_encoders
from obsdiff_export.component import Component


def components(family: Family, pipeline: DiffusionPipeline, *, height: int, width: int) -> tuple[Component, ...]:
    """Text encoders, denoiser, VAE decoders and encoder: those that the pipeline has, as the export needs them.

    Example inputs are small; the last of `more_inputs` has the asked size in pixels, up to 256 a side.

    Raises:
        ModelError: a component of a class that is not known, or with inputs that are not exported.
    """
    model: nn.Module = getattr(pipeline, family.denoiser)
    denoiser = references.component(
        family, model, type(pipeline).__name__, height=height, width=width, vae_scale=vae_scale_of(pipeline, family)
    )
    return (*text_encoders(pipeline), denoiser, *autoencoder(pipeline, height=height, width=width))
