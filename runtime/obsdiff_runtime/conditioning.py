"""How each diffusers pipeline turns prompts into what its denoiser is told: a function and a line in KINDS.

Shapes: n prompts, t text tokens, d width of a text token, p pooled width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import unescape
from math import isqrt
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime import seeing
from obsdiff_runtime.bundle import TensorEntry
from obsdiff_runtime.errors import BundleError, CompatibilityError, ConfigError
from obsdiff_runtime.labels import COUNT, read_labels
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.references import FLUX2 as FLUX2_REFERENCES
from obsdiff_runtime.references import KONTEXT, QWEN_EDIT, QWEN_EDIT_PLUS, References, Sides

PACKED: Final = 2  # latent pixels a side of a token, which the pipeline packs; the denoiser's patch_size is 1
PIXART_ADDED: Final = 128  # sample_size of a denoiser that is told the image's size where its config does not say
QWEN_TEMPLATE: Final = "prompt_template_encode"  # of diffusers' pipeline; in the configuration of its text encoder
QWEN_DROPPED: Final = "prompt_template_encode_start_idx"  # likewise: tokens of the template in front of the prompt
HUNYUAN_ORIGINAL: Final = (1024, 1024)  # pixels; the pipeline's default for the picture that the drawn one is made of
SANA_INSTRUCTION: Final = "complex_human_instruction"  # in the configuration of its text encoder: lines
LUMINA2_PROMPT: Final = "system_prompt"  # likewise: what prompts stand behind

PROMPT_TEMPLATE: Final = "prompt_template"  # in the configuration of a chat model that encodes: what is around a prompt
IS_DISTILLED: Final = "is_distilled"  # in the index of a pipeline whose steps are distilled: it takes no guidance

GUIDANCE: Final = "guidance"
GUIDANCE_WAVES: Final = "timestep_cond"
"""Inputs of denoisers that are told the scale: as it is, or as sines and cosines."""

EXAMPLE: Final = "a large red circle above a small blue square"
"""A prompt that all draw that read text."""

Conditions = dict[str, NDArray[Any]]
"""By input of the denoiser; float32, but for the numbers of classes, int64."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a call resolved to; nothing in it is a default any more."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    num_frames: int | None = None  # of a film
    guided: bool  # each image is run twice, the first time on its negative prompt
    skipped_steps: int = 0
    strength: float = 1.0  # share of its noise levels that the scheduler spaces the steps over
    guidance_scale_2: float | None = None  # of the denoisers behind the first, where some take turns
    references: tuple[Sides, ...] = ()  # pictures that the denoiser is told
    seen: tuple[seeing.Seen, ...] = ()  # the same, where the text encoder looks at them, too

    def scale_of(self, *, first: bool) -> float:
        """The guidance scale of the first denoiser, or of one behind it."""
        return self.guidance_scale if first or self.guidance_scale_2 is None else self.guidance_scale_2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A pipeline as the loop sees it.

    Attributes:
        denoiser: component that is called at each step.
        noisy: its input for latents.
        predicted: its output.
        encode: conditions of one prompt each, (n, ...), by input of the denoiser; told the prompts and whether they
            are the negative ones.
        patch: pixels of the latent that the denoiser cannot split, from its config.
        channels: of the latents, from the denoiser's config.
        largest: largest latent side the denoiser takes, from its config; None where there is no limit.
        skipped: steps of so many that are left out where an image is changed by a strength; None where the scheduler
            spaces all of them over the noise levels that the strength leaves.
        only: the one latent side it draws, from its config; None where it draws others.
        negatives: whether guidance runs an image on its negative prompt too, unless the denoiser is told its scale.
        unguided: the scale up to which there is no such guidance. It is 0 where diffusers' pipeline means by its scale
            how much is added, which is one less than what others mean.
        draws_classes: whether prompts are names or numbers of classes, so that a negative one can but be empty.
        example: a prompt that it can draw.
        even_sigmas: whether diffusers' pipeline gives the scheduler its noise levels; see `make_scheduler`.
        scheduler: diffusers class of the only one whose timesteps its denoiser knows; None where there are others.
        shift: mu of a shift that depends on the image's tokens and the steps, where the pipeline says it and not the
            scheduler.
        counted: what a schedule that depends on the image's tokens is told; from the latents' channels and the tokens.
        kept_lengths: lengths of parts of (c, h, w) latents, which what guidance gives takes from what the prompt alone
            gives; they broadcast to (c, h, w). None where it does not.
        references: how the denoiser is told pictures; None where it is told none.
        opens: whether films begin with a picture, which the denoiser is told; see openings.py.
        masks: whether films can begin with a picture, whose latents stand in place of what is drawn.
    """

    denoiser: str = "transformer"
    noisy: str = "hidden_states"
    predicted: str = "out_hidden_states"
    encode: Callable[[Networks, Sequence[str], bool, Settings], Conditions]
    patch: Callable[[Mapping[str, Any]], int]
    largest: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    only: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    skipped: Callable[[int, float], int] | None
    channels: Callable[[Mapping[str, Any]], int] = lambda config: int(config["in_channels"])
    negatives: bool = True
    unguided: float = 1.0
    draws_classes: bool = False
    example: str = EXAMPLE
    even_sigmas: bool = False
    scheduler: str | None = None
    shift: Callable[[int, int], float] | None = None
    counted: Callable[[int, int], int] = lambda channels, tokens: tokens
    kept_lengths: Callable[[Array], Array] | None = None
    references: References | None = None
    opens: bool = False
    masks: bool = False

    def usual_scale(self, guidance_scale: float) -> float:
        """The pipeline's scale as most count it: 1 is what the prompt alone gives."""
        return guidance_scale + (1 - self.unguided)


def encode_sd3(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Two CLIP encoders side by side, zeros up to T5's width; T5, or zeros in its place, behind them."""
    length = _max_length(networks, "tokenizer")  # of both: diffusers asks the first tokenizer only
    hidden, pooled = [], []
    for suffix in ("", "_2"):
        states = _clip(networks, suffix, prompts, length, "text_embeds")
        hidden.append(states["hidden"])
        pooled.append(states["text_embeds"])
    clip = np.concatenate(hidden, axis=-1)  # (n, t, d1 + d2)
    if networks.has("text_encoder_3"):
        t5 = _t5(networks, "_3", prompts, settings.max_sequence_length)  # (n, max_sequence_length, d)
    else:
        width = networks.bundle.config("transformer")["joint_attention_dim"]
        t5 = np.zeros((len(prompts), settings.max_sequence_length, width), dtype=np.float32)
    clip = np.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    return {
        "encoder_hidden_states": np.concatenate([clip, t5], axis=1),
        "pooled_projections": np.concatenate(pooled, axis=-1),
    }


def encode_sd(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """The last hidden states of one CLIP encoder."""
    ids = networks.tokenizer("tokenizer").ids(prompts, _max_length(networks, "tokenizer"))
    return {
        "encoder_hidden_states": networks.run("text_encoder", {"input_ids": ids}, ["last_hidden_state"])[
            "last_hidden_state"
        ]
    }


def encode_sdxl(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Two CLIP encoders side by side, the second one's pooled text, and sizes.

    Negative prompts that are all empty become zeros where the pipeline was trained so (force_zeros_for_empty_prompt).
    """
    hidden = []
    for suffix in ("", "_2"):
        if not networks.has(f"text_encoder{suffix}"):  # the refiner has only the second
            continue
        states = _clip(
            networks, suffix, prompts, _max_length(networks, f"tokenizer{suffix}"), "text_embeds" if suffix else None
        )
        hidden.append(states["hidden"])
    size = (settings.height, settings.width)
    times = np.array([*size, 0, 0, *size], dtype=np.float32)  # original size, crop's corner, target size
    embeds: Array = np.concatenate(hidden, axis=-1)
    pooled = states["text_embeds"]
    if negative and not any(prompts) and networks.bundle.index().get("force_zeros_for_empty_prompt", True):
        embeds, pooled = np.zeros_like(embeds), np.zeros_like(pooled)
    return {
        "encoder_hidden_states": embeds,
        "text_embeds": pooled,
        "time_ids": np.tile(times, (len(prompts), 1)),
    }


def encode_flux(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, and one CLIP encoder's pooled text."""
    ids = networks.tokenizer("tokenizer").ids(prompts, _max_length(networks, "tokenizer"))
    pooled = networks.run("text_encoder", {"input_ids": ids}, ["pooler_output"])["pooler_output"]
    return {
        "encoder_hidden_states": _t5(networks, "_2", prompts, settings.max_sequence_length),
        "pooled_projections": pooled,
    }


def encode_pixart(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, told what is padding, and which tokens are not; where the denoiser is trained so, the image's size and shape.

    As diffusers with clean_caption=False: prompts in lower case, without spaces at their ends. Its default, where
    ftfy and beautifulsoup4 are installed, also takes out links, marks and HTML. As with
    use_resolution_binning=False: the very size that is asked for is drawn. Its default draws the nearest of a table
    of sizes and scales the image.
    """
    written = [prompt.lower().strip() for prompt in prompts]
    states, mask = _masked(networks, "", written, settings.max_sequence_length)
    told = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    config = networks.bundle.config("transformer")
    added = config.get("use_additional_conditions")
    if config["sample_size"] == PIXART_ADDED if added is None else added:
        height, width = settings.height, settings.width
        told["resolution"] = np.tile(np.array([height, width], np.float32), (len(prompts), 1))
        told["aspect_ratio"] = np.full((len(prompts), 1), height / width, np.float32)
    return told


def encode_auraflow(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, told what is padding; what it makes of padding is set to zero."""
    states, mask = _masked(networks, "", prompts, settings.max_sequence_length)
    return {"encoder_hidden_states": states * mask[..., None]}


def encode_sana(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Gemma-2, told what is padding, and which tokens are not.

    Prompts, not negative ones, stand behind the instruction that the bundle has of diffusers' pipeline. Of its tokens
    the first is kept, and of the prompt's all but the first: as many as negative ones have. The rest is as PixArt's.
    """
    written, length = [prompt.lower().strip() for prompt in prompts], settings.max_sequence_length
    longest = length
    instruction = "\n".join(networks.bundle.config("text_encoder").get(SANA_INSTRUCTION) or ())
    if instruction and not negative:
        written = [instruction + prompt for prompt in written]
        longest = networks.tokenizer("tokenizer").length(instruction) + length - 2
    # padded as the pipeline does, whatever its tokenizer does
    states, mask = _masked(networks, "", written, longest, pads_left=False)
    kept = [0, *range(1 - length, 0)]
    return {"encoder_hidden_states": states[:, kept], "encoder_attention_mask": mask[:, kept]}


def encode_flux2(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Hidden states of a chat model, told what is padding, though the denoiser looks at it."""
    before, behind = networks.bundle.config("text_encoder")[PROMPT_TEMPLATE]
    written = [f"{before}{prompt}{behind}" for prompt in prompts]
    length = settings.max_sequence_length
    states, _ = _masked(networks, "", written, length, output="prompt_embeds", special=False)
    return {"encoder_hidden_states": states}


def encode_flux2_dev(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """As klein's, of prompts without the mark that stands for an image."""
    return encode_flux2(networks, [prompt.replace("[IMG]", "") for prompt in prompts], negative, settings)


def encode_qwen(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Qwen2.5-VL on the prompt inside of the template that the bundle has of diffusers' pipeline, and where text is.

    The template's first tokens are left out of what it makes of them; what is padding is set to zero.
    """
    config = networks.bundle.config("text_encoder")
    written = [str(config[QWEN_TEMPLATE]).format(prompt) for prompt in prompts]
    # padded behind, for the pipeline drops whatever stands in front
    states, mask = _masked(
        networks, "", written, int(config[QWEN_DROPPED]) + settings.max_sequence_length, pads_left=False
    )
    return _behind_template(config, states, mask)


def encode_qwen_edit(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """As Qwen-Image's, with what Qwen2.5-VL's vision made of the pictures among the text.

    Where the template has no place for one, they stand in front of the prompt, each behind its number. Their tokens
    come on top of the length that is asked for.

    Raises:
        ConfigError: a prompt holds the mark of a picture, or there is no room for what stands around pictures.
    """
    config = networks.bundle.config("text_encoder")
    template, count = str(config[QWEN_TEMPLATE]), sum(len(each.states) for each in settings.seen)
    if any(seeing.MARK in prompt for prompt in prompts):
        raise ConfigError(f"a prompt may not hold {seeing.MARK}, which stands for pictures")
    before = "".join(f"Picture {index + 1}: {seeing.PICTURE}" for index in range(len(settings.seen)))
    before = "" if seeing.MARK in template else before
    written = [seeing.written(template.format(before + prompt), settings.seen) for prompt in prompts]
    length = int(config[QWEN_DROPPED]) + settings.max_sequence_length + count
    ids, mask = networks.tokenizer("tokenizer").masked_ids(written, length, pads_left=False)
    image = int(config["image_token_id"])
    if ((ids == image).sum(axis=1) != count).any():
        raise ConfigError(
            f"max_sequence_length {settings.max_sequence_length} leaves no room for what is around pictures"
        )
    inputs = {"input_ids": ids, "attention_mask": mask, **seeing.told(ids, image, settings.seen)}
    states = networks.run("text_encoder", inputs, ["last_hidden_state"])["last_hidden_state"]
    return _behind_template(config, states, mask.astype(np.float32))


def _behind_template(config: Mapping[str, Any], states: Array, mask: Array) -> Conditions:
    """What Qwen-Image's denoiser is told of hidden states (n, t, d) and of where text is, (n, t)."""
    dropped = int(config[QWEN_DROPPED])
    states, mask = states[:, dropped:], mask[:, dropped:]
    return {"encoder_hidden_states": states * mask[..., None], "encoder_hidden_states_mask": mask}


def encode_lumina2(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Gemma-2 up to the layer before its last, told what is padding, and which tokens are not.

    Prompts, not negative ones, stand behind the system prompt that the bundle has of diffusers' pipeline; it counts as
    text.
    """
    prompt = networks.bundle.config("text_encoder")[LUMINA2_PROMPT]
    written = list(prompts) if negative else [f"{prompt} <Prompt Start> {text}" for text in prompts]
    output = f"hidden_states.{networks.hidden_layers('text_encoder')}"
    states, mask = _masked(networks, "", written, settings.max_sequence_length, output=output, pads_left=False)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def encode_zimage(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Qwen3 on the prompt inside of the template that the bundle has of its tokenizer, and which tokens are padding."""
    before, behind = networks.bundle.config("text_encoder")[PROMPT_TEMPLATE]
    written = [f"{before}{prompt}{behind}" for prompt in prompts]
    # padded behind, for the denoiser counts places from the first token
    states, mask = _masked(networks, "", written, settings.max_sequence_length, output="prompt_embeds", pads_left=False)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def encode_wan(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """UMT5, told what is padding, which becomes zeros.

    As diffusers without ftfy, which it uses where that is installed: marks of HTML are read and spaces joined.
    """
    inputs = networks.bundle.component("transformer").inputs
    (tokens,) = (port.shape[1] for port in inputs if port.name == "encoder_hidden_states")
    if isinstance(tokens, int) and tokens != settings.max_sequence_length:
        asked = settings.max_sequence_length
        raise ConfigError(f"max_sequence_length is fixed to {tokens} in this bundle's graph, not {asked}")
    written = [" ".join(unescape(unescape(prompt)).split()) for prompt in prompts]
    states, mask = _masked(networks, "", written, settings.max_sequence_length)
    return {"encoder_hidden_states": states * mask[..., None]}


def encode_hunyuan(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """BERT and T5, told what is padding, which tokens are not; up to version 1.1 of the denoiser, the image's size.

    As with use_resolution_binning=False: the very size that is asked for is drawn.
    """
    config = networks.bundle.config("transformer")
    told: Conditions = {}
    for suffix, name, length in (("", "", "text_len"), ("_2", "_t5", "text_len_t5")):
        states, mask = _masked(networks, suffix, prompts, int(config[length]))
        told |= {f"encoder_hidden_states{name}": states, f"text_embedding_mask{name}": mask}
    if config["use_style_cond_and_image_meta_size"]:
        sizes = np.array([*HUNYUAN_ORIGINAL, settings.height, settings.width, 0, 0], np.float32)
        told["image_meta_size"] = np.tile(sizes, (len(prompts), 1))
    return told


def encode_dit(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Numbers of classes; the negative one is that behind the last, which stands for none."""
    config = networks.bundle.config("transformer")
    labels = read_labels(networks.bundle.index(), config)
    numbers = [int(config[COUNT]) if negative else labels.number(prompt) for prompt in prompts]
    return {"class_labels": np.array(numbers, np.int64)}


def told_scale(inputs: Iterable[TensorEntry], scale: float) -> Conditions:
    """What the denoiser is told of one image's guidance scale, () or (width,), where it has an input for it."""
    told: Conditions = {}
    for entry in inputs:
        if entry.name == GUIDANCE:
            told[entry.name] = np.array(scale, dtype=np.float32)
        elif entry.name == GUIDANCE_WAVES:
            told[entry.name] = _waves(1000 * (scale - 1), int(entry.shape[1]))
    return told


def _waves(value: float, width: int) -> Array:
    """(width,): sines, then cosines, of frequencies from 1 to 1 / 10000; Luo et al. 2023 tell the scale so."""
    half = width // 2
    angles = np.float32(value) * np.exp(np.arange(half, dtype=np.float32) * -np.float32(np.log(10000) / (half - 1)))
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, width % 2))


def _clip(networks: Networks, suffix: str, prompts: Sequence[str], length: int, pooled: str | None) -> dict[str, Array]:
    """Penultimate hidden states (n, t, d) as "hidden", and the pooled output (n, p) if one is named."""
    encoder = f"text_encoder{suffix}"
    ids = networks.tokenizer(f"tokenizer{suffix}").ids(prompts, length)
    penultimate = f"hidden_states.{networks.hidden_layers(encoder) - 1}"
    results = networks.run(encoder, {"input_ids": ids}, [penultimate] + ([pooled] if pooled else []))
    results["hidden"] = results.pop(penultimate)
    return results


def _t5(networks: Networks, suffix: str, prompts: Sequence[str], length: int) -> Array:
    """(n, length, d), padding included."""
    ids = networks.tokenizer(f"tokenizer{suffix}").ids(prompts, length)
    return networks.run(f"text_encoder{suffix}", {"input_ids": ids}, ["last_hidden_state"])["last_hidden_state"]


def _masked(
    networks: Networks,
    suffix: str,
    texts: Sequence[str],
    length: int,
    *,
    output: str = "last_hidden_state",
    **options: bool,
) -> tuple[Array, Array]:
    """What an encoder that is told of padding makes of texts, (n, length, d), and where text is, (n, length), float32.

    Args:
        networks: of the bundle.
        suffix: of the encoder's name and of its tokenizer's.
        texts: as they are read.
        length: of all rows, in tokens.
        output: of the encoder.
        options: of `PromptTokenizer.masked_ids`.
    """
    ids, mask = networks.tokenizer(f"tokenizer{suffix}").masked_ids(texts, length, **options)
    states = networks.run(f"text_encoder{suffix}", {"input_ids": ids, "attention_mask": mask}, [output])[output]
    return states, mask.astype(np.float32)


def _max_length(networks: Networks, tokenizer: str) -> int:
    length = networks.tokenizer(tokenizer).max_length
    if length is None:
        raise BundleError(f"{tokenizer}/tokenizer_config.json: model_max_length is missing; CLIP needs it")
    return length


def _unet_patch(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _flux2_shift(image_tokens: int, steps: int) -> float:
    """Lines over the tokens for 10 and for 200 steps, and between them a line over the steps; diffusers' numbers."""
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    return at_200 + (at_10 - at_200) / 190 * (200 - steps)


def _lengths_of_patches(latents: Array) -> Array:
    """Over the channels and pixels of each packed token, (c, h, w) -> (h, w)."""
    channels, height, width = latents.shape
    split = latents.reshape(channels, height // PACKED, PACKED, width // PACKED, PACKED)
    lengths = np.sqrt(np.square(split).sum(axis=(0, 2, 4)))
    return np.asarray(lengths.repeat(PACKED, axis=0).repeat(PACKED, axis=1))


def _lengths_of_rows(latents: Array) -> Array:
    """Of each row of pixels, (c, h, w) -> (c, h, 1)."""
    return np.asarray(np.linalg.norm(latents, axis=-1, keepdims=True))


def _skipped_part(steps: int, strength: float) -> int:
    return int(steps - steps * strength)


def _skipped_whole(steps: int, strength: float) -> int:
    return steps - int(steps * strength)


SD3: Final = Kind(
    encode=encode_sd3,
    patch=lambda config: int(config["patch_size"]),
    largest=lambda config: int(config["pos_embed_max_size"]) * int(config["patch_size"]),
    skipped=_skipped_part,
)
SD: Final = Kind(
    denoiser="unet",
    noisy="sample",
    predicted="out_sample",
    encode=encode_sd,
    patch=_unet_patch,
    skipped=_skipped_whole,
)
LCM: Final = replace(SD, skipped=None, scheduler="LCMScheduler")
SDXL: Final = Kind(
    denoiser="unet",
    noisy="sample",
    predicted="out_sample",
    encode=encode_sdxl,
    patch=_unet_patch,
    skipped=_skipped_whole,
)
FLUX: Final = Kind(
    encode=encode_flux,
    patch=lambda config: PACKED,
    channels=lambda config: int(config["in_channels"]) // PACKED**2,
    skipped=_skipped_part,
    negatives=False,
    even_sigmas=True,
)
FLUX_KONTEXT: Final = replace(FLUX, references=KONTEXT)
PIXART: Final = Kind(
    encode=encode_pixart,
    patch=lambda config: int(config["patch_size"]),
    skipped=_skipped_whole,  # diffusers has no pipeline of PixArt that changes an image; as Stable Diffusion's
)
AURAFLOW: Final = Kind(
    encode=encode_auraflow,
    patch=lambda config: int(config["patch_size"]),
    largest=lambda config: isqrt(int(config["pos_embed_max_size"])) * int(config["patch_size"]),
    skipped=_skipped_part,  # diffusers has no pipeline of AuraFlow that changes an image; as SD3's
)
SANA: Final = Kind(
    encode=encode_sana,
    patch=lambda config: int(config["patch_size"]),
    skipped=_skipped_whole,  # as PixArt's
)
SANA_SPRINT: Final = replace(SANA, skipped=_skipped_part, scheduler="SCMScheduler")
FLUX2_KLEIN: Final = Kind(
    encode=encode_flux2,
    patch=lambda config: 1,  # its latents are patches already
    skipped=_skipped_part,  # diffusers has no pipeline of FLUX.2 that changes an image by a strength; as FLUX.1's
    even_sigmas=True,
    shift=_flux2_shift,
    references=FLUX2_REFERENCES,
)
FLUX2: Final = replace(FLUX2_KLEIN, encode=encode_flux2_dev)
QWEN: Final = Kind(
    encode=encode_qwen,
    patch=lambda config: PACKED,
    channels=lambda config: int(config["in_channels"]) // PACKED**2,
    skipped=_skipped_part,
    even_sigmas=True,
    kept_lengths=_lengths_of_patches,
)
QWEN_IMAGE_EDIT: Final = replace(QWEN, encode=encode_qwen_edit, references=QWEN_EDIT)
QWEN_IMAGE_EDIT_PLUS: Final = replace(QWEN_IMAGE_EDIT, references=QWEN_EDIT_PLUS)
LUMINA2: Final = Kind(
    encode=encode_lumina2,
    patch=lambda config: int(config["patch_size"]),
    largest=lambda config: int(min(config["axes_lens"][1:])) * int(config["patch_size"]),
    skipped=_skipped_part,  # as AuraFlow's
    even_sigmas=True,
    counted=lambda channels, tokens: channels,  # diffusers' pipeline counts them in place of tokens
    kept_lengths=_lengths_of_rows,
)
HUNYUAN: Final = Kind(
    encode=encode_hunyuan,
    patch=lambda config: int(config["patch_size"]),
    skipped=_skipped_whole,  # as PixArt's
)
DIT: Final = Kind(
    encode=encode_dit,
    patch=lambda config: int(config["patch_size"]),
    only=lambda config: int(config["sample_size"]),
    skipped=_skipped_whole,  # as PixArt's
    draws_classes=True,
    example="0",
)
WAN: Final = Kind(
    encode=encode_wan,
    patch=lambda config: int(config["patch_size"][-1]),
    channels=lambda config: int(config["out_channels"] or config["in_channels"]),
    skipped=_skipped_whole,  # as PixArt's
)
WAN_OPENING: Final = replace(WAN, opens=True)
ZIMAGE: Final = Kind(
    encode=encode_zimage,
    patch=lambda config: PACKED,
    largest=lambda config: int(min(config["axes_lens"][1:])) * PACKED,
    skipped=_skipped_part,
    unguided=0.0,
    even_sigmas=True,
)
KINDS: Final[dict[str, Kind]] = {
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusionPipeline": SD,
    "LatentConsistencyModelPipeline": LCM,
    "StableDiffusionXLPipeline": SDXL,
    "FluxPipeline": FLUX,
    "FluxKontextPipeline": FLUX_KONTEXT,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
    "AuraFlowPipeline": AURAFLOW,
    "SanaPipeline": SANA,
    "SanaSprintPipeline": SANA_SPRINT,
    "Flux2KleinPipeline": FLUX2_KLEIN,
    "Flux2Pipeline": FLUX2,
    "QwenImagePipeline": QWEN,
    "QwenImageEditPipeline": QWEN_IMAGE_EDIT,
    "QwenImageEditPlusPipeline": QWEN_IMAGE_EDIT_PLUS,
    "Lumina2Pipeline": LUMINA2,
    "HunyuanDiTPipeline": HUNYUAN,
    "DiTPipeline": DIT,
    "WanPipeline": WAN,
    "WanImageToVideoPipeline": WAN_OPENING,
    "ZImagePipeline": ZIMAGE,
}


def kind_of(pipeline_class: str) -> Kind:
    """How that diffusers class samples; CompatibilityError with the list if it is not known here."""
    if pipeline_class not in KINDS:
        raise CompatibilityError(f"the runtime cannot sample a {pipeline_class}; it can {', '.join(KINDS)}")
    return KINDS[pipeline_class]
