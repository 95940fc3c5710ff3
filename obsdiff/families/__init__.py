"""Architectures of denoisers. A family is a module here and a line in table.FAMILIES."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.groups import Group, LinearSpec
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds.table import KINDS

HELP: Final = "docs/add-a-family.md in obsdiff's repository says how to describe one"


class Family(Protocol):
    """What obsdiff has to know of an architecture; each module of this package is one.

    Attributes:
        name: "sd3", "unet", ...
        denoiser: attribute and folder of the denoiser in the pipeline: "transformer" or "unet".
        classes: diffusers classes of the denoiser.
        pipeline: diffusers class of the pipeline that a denoiser on its own is taken to belong to.
        protect: blocks at the start and at the end that keep all their units unless asked otherwise; the paper's.
        vae_scale: pixels per side of a latent pixel where there is no VAE to ask.
        negatives: whether guidance runs every image twice, once on a negative prompt (classifier-free guidance); where
            not, it is distilled into the denoiser, which is told its scale. A denoiser whose configuration has
            `guidance_embeds` or `time_cond_proj_dim` is told it in any family.
        negative_first: whether rows of negative prompts stand before the others in one call of the denoiser.
        described: whether the denoiser's units, inputs and outputs are known; of `generic` only its linears are.
        text_mask: argument of the denoiser's forward, (rows, text tokens), 1 for text and 0 for padding that no image
            token looks at; or (rows, joint tokens), text first; or the text itself, row by row without padding. None:
            it looks at all of it. But for the second, a "joint" sequence has no padding between a row's text and its
            image; see `padding.masks`.
    """

    name: str
    denoiser: str
    classes: tuple[str, ...]
    pipeline: str
    protect: tuple[int, int]
    vae_scale: int
    negatives: bool
    negative_first: bool
    described: bool
    text_mask: str | None

    def linears(self, denoiser: nn.Module) -> tuple[LinearSpec, ...]:
        """Every prunable linear, in forward order; works on the meta device and on shrunk models."""
        ...

    def groups(self, denoiser: nn.Module) -> tuple[Group, ...]:
        """Every group of heads and FFN neurons, in forward order; works on the meta device and on shrunk models."""
        ...

    def tokens(
        self, config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
    ) -> dict[str, int]:
        """Tokens per image, or film, in each sequence that LinearSpec.tokens names, at an image size in pixels.

        `config` is the denoiser's; `vae_scale` is how many pixels a side of a latent pixel stands for.
        """
        ...

    def text_tokens(self, configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
        """Text tokens that the denoiser reads of one prompt.

        `configs` are those of the pipeline's components, by name; a denoiser on its own has only its own.
        """
        ...

    def latent_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Latent (height, width) that the pipeline draws unless asked otherwise; `config` is the denoiser's."""
        ...

    def encode(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        negative: Sequence[str],
        *,
        max_sequence_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Text embeddings as keyword arguments of the pipeline's call, (len(prompts), ...) each.

        Empty where the call reads the prompts itself.

        Args:
            pipeline: with its text encoders and tokenizers.
            prompts: what to draw.
            negative: as many as there are prompts, or empty where no guidance is used, or it knows no negative prompts.
            max_sequence_length: text tokens of T5, where the family has it; None: the pipeline's default.

        Raises:
            ModelError: the pipeline lacks what reads prompts.
            ConfigError: max_sequence_length is given and the family has no use for it; or a prompt is none it can draw.
        """
        ...

    def example(
        self, denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Seeded inputs of the denoiser as exported, by ONNX name, on the CPU.

        `size` is that of the latents, `pixels` that of the image; both (height, width), but latents of films may have
        their frames before. A film has as many as the family says where there are none. A denoiser on the meta device
        is enough.
        """
        ...

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Inputs by ONNX name as keyword arguments of the denoiser's forward."""
        ...

    def component(self, denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
        """The denoiser as the export and the runtime see it: latents (b, channels, h, w) in, the same out.

        Those of films have an axis of frames before the height.

        Example inputs are small; the last of `more_inputs` has the asked size in pixels, up to 256 a side.

        Raises:
            ModelError: it takes inputs that are not exported.
        """
        ...


def require_described(family: Family, what: str) -> None:
    """Raises ConfigError where the family does not describe the denoiser, and `what` needs it."""
    if not family.described:
        raise ConfigError(
            f"{what} needs to know how the denoiser is put together, and no family describes this one; without, "
            f"obsdiff prune takes N:M and unstructured sparsity. {HELP}"
        )


def guided(family: Family, denoiser: nn.Module, guidance_scale: float) -> bool:
    """Whether every image is run twice, the first time on its negative prompt."""
    config: Any = denoiser.config
    told = config.get("guidance_embeds") or config.get("time_cond_proj_dim")
    return family.negatives and not told and usual_scale(family, guidance_scale) > 1


def usual_scale(family: Family, guidance_scale: float) -> float:
    """See `Kind.usual_scale`; of a family that the runtime does not know it is the scale itself."""
    kind = KINDS.get(family.pipeline)
    return guidance_scale if kind is None else kind.usual_scale(guidance_scale)


def rows(family: Family, denoiser: nn.Module, guidance_scale: float) -> int:
    """Rows of the denoiser's batch for one image."""
    return 2 if guided(family, denoiser, guidance_scale) else 1
