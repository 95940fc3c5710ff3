"""Exportable networks that families share: text encoders and autoencoders, and how a denoiser is made flat.

    b         batch
    h, w      sides of the latent image
    s         VAE scale: pixels per side of a latent pixel
    l         text tokens

Names of inputs and outputs are those of optimum's ONNX folders. Networks keep the names of their weights.
"""

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from obsdiff.families import Family
from obsdiff_export.component import Component
from obsdiff_runtime.autoencoder import VAE_SCALE as VAE_SCALE
from obsdiff_runtime.autoencoder import latent_channels
from obsdiff_runtime.autoencoder import vae_scale as vae_scale
from obsdiff_runtime.conditioning import PROMPT_TEMPLATE, QWEN_DROPPED, QWEN_TEMPLATE
from obsdiff_runtime.errors import ConfigError, ModelError

Size = tuple[int, int]

PATCH: Final = 2
"""Latent pixels per side of a patch of FLUX.2's autoencoder; its pipelines fix it."""

AUTOENCODERS: Final = ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLFlux2", "AutoencoderKLQwenImage")

CLIP_TOKENS: Final = 77

INSTRUCTION: Final = "complex_human_instruction"
"""Argument of a pipeline's call, and where it is written in the text encoder's configuration for the runtime."""

GUIDANCE: Final = "guidance_scale"
"""Argument of most pipelines' calls."""

SYSTEM_PROMPT: Final = "system_prompt"
"""Attribute of a pipeline, what its prompts stand behind, and where it is written likewise."""

_SPECIAL: Final = 2  # tokens at the ends of a text that the instruction is not counted to have
_LARGEST_EXAMPLE = 256
_SEED = 0


class Flat(nn.Module):
    """A model under another forward: its submodules and weights, under the names they have in it.

    Subclasses define a forward that takes the inputs by name, calls `self.source`, and returns tensors. Copies stay
    whole: a deep copy's `source` has the copied weights. Puts the model into eval mode.
    """

    source: Any

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = source._parameters, source._buffers, source._modules
        self._non_persistent_buffers_set = source._non_persistent_buffers_set
        self.__dict__["source"] = source.eval()  # beside the registry: all it holds is registered already
        self.training = False


def view(module: nn.Module, **children: nn.Module) -> Any:
    """A shallow copy with the same weights, some of its children exchanged."""
    seen = copy.copy(module)
    seen._modules = {**module._modules, **children}
    return seen


def latent_sizes(height: int, width: int, *, vae_scale: int, multiple: int, limit: int | None = None) -> list[Size]:
    """Three sizes of latents to export and compare with: two small and lopsided, and the one asked for.

    Args:
        height: of the image, in pixels; what exceeds 256 is cut to that, so that comparing stays quick.
        width: likewise.
        vae_scale: pixels per side of a latent pixel.
        multiple: sides must be multiples of it.
        limit: most multiples that a side can have.
    """
    largest = limit or max(height, width)
    asked = [max(1, min(side, _LARGEST_EXAMPLE) // vae_scale // multiple) for side in (height, width)]
    return [
        (multiple * min(rows, largest), multiple * min(columns, largest))
        for rows, columns in ((3, 5), (6, 4), (asked[0], asked[1]))
    ]


def rows(sizes: Sequence[Size]) -> list[tuple[int, int, Size]]:
    """Per example its batch, text tokens and size; the first one is traced, so all its sizes are distinct."""
    return [(batch, length, size) for batch, length, size in zip((2, 3, 1), (11, 7, 13), sizes, strict=True)]


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    """Seeded normal numbers, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)).to(dtype)


def timesteps(batch: int, *, dtype: torch.dtype) -> Tensor:
    """(b,): distinct timesteps between 1 and 999."""
    return torch.linspace(999, 1, batch).to(dtype)


def config_of(model: Any) -> dict[str, Any]:
    """A diffusers or transformers model's configuration as JSON data, without where it was loaded from."""
    source = model if hasattr(model, "to_json_string") else model.config
    config: dict[str, Any] = json.loads(source.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def vae_scale_of(pipeline: DiffusionPipeline, family: Family) -> int:
    """Pixels per side of a latent pixel; the family's where the pipeline has no VAE."""
    vae = getattr(pipeline, "vae", None)
    return family.vae_scale if vae is None else vae_scale(vae.config)


def clip_tokens(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Text tokens of the first text encoder; CLIP's 77, which is what the paper counts, of a denoiser on its own."""
    return int(configs.get("text_encoder", {}).get("max_position_embeddings", CLIP_TOKENS))


def sample_size(config: Mapping[str, Any]) -> Size:
    """Latent (height, width) by a denoiser's `sample_size`; 64 a side where it says none."""
    size = config.get("sample_size") or 64
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def components(family: Family, pipeline: DiffusionPipeline, *, height: int, width: int) -> tuple[Component, ...]:
    """Text encoders, denoiser, VAE decoder and encoder: those that the pipeline has, as the export needs them.

    Example inputs are small; the last of `more_inputs` has the asked size in pixels, up to 256 a side.

    Raises:
        ModelError: a component of a class that is not known, or with inputs that are not exported.
        ConfigError: the pipeline draws films.
    """
    require_pictures(type(pipeline), "a bundle")
    model: nn.Module = getattr(pipeline, family.denoiser)
    denoiser = family.component(model, height=height, width=width, vae_scale=vae_scale_of(pipeline, family))
    return (*text_encoders(pipeline), denoiser, *autoencoder(pipeline, height=height, width=width))


def denoiser_component(
    flat: Flat,
    example: Callable[..., dict[str, Tensor]],
    *,
    name: str,
    output: str,
    latents: str,
    sizes: Sequence[Size],
    pixels: Size,
    text: Sequence[str] = ("encoder_hidden_states",),
) -> Component:
    """A denoiser whose inputs all have a batch, whose latents any size, and whose text any length.

    Args:
        flat: the denoiser as exported.
        example: the family's `example`.
        name: of the component.
        output: name of what it gives.
        latents: its input for latents, (b, channels, h, w), or (b, channels, frames, h, w).
        sizes: three sizes of latents; see `latent_sizes`.
        pixels: (height, width) of the image.
        text: its inputs of text, (b, text tokens, ...).
    """
    examples = [
        example(flat.source, batch=batch, size=size, text_tokens=length, pixels=pixels)
        for batch, length, size in rows(sizes)
    ]
    axes = {key: {0: "batch"} for key in examples[0]}
    sides = examples[0][latents].ndim
    axes[latents] |= {sides - 2: "height", sides - 1: "width"}
    for key in text:
        axes[key] |= {1: "text_tokens"}
    return Component(
        name=name,
        module=flat,
        inputs=examples[0],
        dynamic_axes=axes,
        outputs=(output,),
        config=config_of(flat.source),
        more_inputs=tuple(examples[1:]),
    )


def need(pipeline: DiffusionPipeline, *names: str) -> None:
    """Raises ModelError unless the pipeline has these components."""
    absent = [name for name in names if getattr(pipeline, name, None) is None]
    if absent:
        raise ModelError(
            f"this {type(pipeline).__name__} has no {', '.join(absent)}, so it cannot read prompts; "
            "load it with its text encoders"
        )


def masked_text(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    max_sequence_length: int | None,
    **more: Any,
) -> dict[str, Tensor]:
    """`Family.encode` of one text encoder: embeddings (n, text tokens, width), and which are text, (n, text tokens)."""
    need(pipeline, "text_encoder", "tokenizer")
    limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=list(prompts),
            negative_prompt=list(negative),
            do_classifier_free_guidance=bool(negative),
            **limit,
            **more,
        )
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    return {key: value for key, value in zip(names, encoded, strict=True) if value is not None}


def guidance_argument(pipeline_class: type[DiffusionPipeline]) -> str:
    """The argument of the call that is the scale of guidance.

    A call that has both of diffusers' guides by GUIDANCE, unless that is None by default: then only a distilled
    denoiser would be told it, and negative prompts have a scale of their own, true_cfg_scale.
    """
    known = inspect.signature(pipeline_class.__call__).parameters
    unused = GUIDANCE not in known or known[GUIDANCE].default is None
    return "true_cfg_scale" if unused and "true_cfg_scale" in known else GUIDANCE


def draws_films(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Whether its call gives frames, not images."""
    return "num_frames" in inspect.signature(pipeline_class.__call__).parameters


def require_pictures(pipeline_class: type[DiffusionPipeline], what: str) -> None:
    """Raises ConfigError where the pipeline draws films, and `what` knows pictures only."""
    if draws_films(pipeline_class):
        raise ConfigError(
            f"{what} is for pipelines that draw pictures, and {pipeline_class.__name__} draws films; "
            "obsdiff prune and obsdiff eval take it"
        )


def instruction(pipeline: DiffusionPipeline) -> list[str]:
    """The lines that the pipeline's call puts before prompts, not negative ones, by default; none where it has none."""
    told = inspect.signature(type(pipeline).__call__).parameters.get(INSTRUCTION)
    return [] if told is None or not told.default else list(told.default)


def instruction_tokens(pipeline: DiffusionPipeline) -> int:
    """Tokens by which a prompt's sequence is longer for that instruction, as SanaPipeline counts them."""
    lines, tokenizer = instruction(pipeline), getattr(pipeline, "tokenizer", None)
    return len(tokenizer.encode("\n".join(lines))) - _SPECIAL if lines and tokenizer is not None else 0


def encode_template(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What the runtime needs to know of the text around every prompt of a QwenImagePipeline, negative ones too.

    Raises:
        ModelError: it is another pipeline; most of those that share its networks read an image with the prompt.
    """
    if type(pipeline).__name__ != "QwenImagePipeline":
        raise ModelError(f"of pipelines of Qwen-Image obsdiff knows QwenImagePipeline, not {type(pipeline).__name__}")
    return {name: getattr(pipeline, name) for name in (QWEN_TEMPLATE, QWEN_DROPPED)}


def template_tokens(pipeline: DiffusionPipeline) -> int:
    """Tokens by which every prompt's sequence is longer than what the denoiser reads of it."""
    return int(getattr(pipeline, QWEN_DROPPED, 0))


def text_encoders(pipeline: DiffusionPipeline) -> list[Component]:
    """The text encoders that are present, in the pipeline's order.

    Raises:
        ModelError: one is none of CLIP, T5, UMT5, BERT, Gemma-2, Qwen2.5-VL, Qwen3 and Mistral-3.
    """
    found = []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        model = getattr(pipeline, name, None)
        if model is None:
            continue
        kind = type(model).__name__
        if kind in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            found.append(_clip(name, model))
        elif kind in ("T5EncoderModel", "UMT5EncoderModel"):
            found.append(_sequence(name, model, _T5(model), masked=_masks_text(pipeline)))
        elif kind == "BertModel":
            found.append(_sequence(name, model, _Masked(model), masked=True, length=CLIP_TOKENS))
        elif kind == "Gemma2Model":
            prompt = getattr(pipeline, SYSTEM_PROMPT, None)
            told = {INSTRUCTION: instruction(pipeline)} if prompt is None else {SYSTEM_PROMPT: prompt}
            output = "last_hidden_state" if prompt is None else f"hidden_states.{model.config.num_hidden_layers - 1}"
            found.append(_sequence(name, model, _Masked(model, output), masked=True, output=output, told=told))
        elif kind == "Qwen2_5_VLForConditionalGeneration":
            told = encode_template(pipeline)
            found.append(_sequence(name, model, _Qwen(model), masked=True, told=told))
        elif kind in ("Qwen3ForCausalLM", "Mistral3ForConditionalGeneration"):
            told = {PROMPT_TEMPLATE: prompt_template(pipeline)}
            flat = _Layers(model, read_layers(pipeline))
            found.append(_sequence(name, model, flat, masked=True, told=told, output="prompt_embeds"))
        else:
            raise ModelError(
                f"{name} is a {kind}; known are CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, "
                "UMT5EncoderModel, BertModel, Gemma2Model, Qwen2_5_VLForConditionalGeneration, "
                "Qwen3ForCausalLM and Mistral3ForConditionalGeneration"
            )
    return found


class _Clip(Flat):
    """Tokens (b, l) to the pooled embedding (b, width), the last and all hidden states (b, l, width)."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.source(input_ids=input_ids, output_hidden_states=True)
        pooled = found.text_embeds if "text_embeds" in found else found.pooler_output
        return (pooled, found.last_hidden_state, *found.hidden_states)


def _clip(name: str, model: Any) -> Component:
    """A CLIP text encoder. Its sequence is always padded to the full length, so that axis is fixed."""
    config = model.config
    pooled = "text_embeds" if type(model).__name__ == "CLIPTextModelWithProjection" else "pooler_output"
    length = int(config.max_position_embeddings)
    states = [f"hidden_states.{index}" for index in range(config.num_hidden_layers + 1)]
    examples = [{"input_ids": _clip_ids(batch, length, config)} for batch in (2, 3, 1)]
    return Component(
        name=name,
        module=_Clip(model),
        inputs=examples[0],
        dynamic_axes={"input_ids": {0: "batch"}},
        outputs=(pooled, "last_hidden_state", *states),
        config=config_of(model),
        more_inputs=tuple(examples[1:]),
    )


def _clip_ids(batch: int, length: int, config: Any) -> Tensor:
    """(b, l), int64: random tokens that end at a different place in each row and are padded behind it."""
    generator = torch.Generator().manual_seed(_SEED)
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = torch.randint(3, config.vocab_size - 2, (batch, length), generator=generator)
    for row in range(batch):
        ids[row, length // 2 + row % max(1, length - length // 2) :] = end
    return ids


class _T5(Flat):
    """Tokens (b, l) to the last hidden state (b, l, width); `attention_mask`, (b, l), is 0 where they are padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states: Tensor = self.source(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class _Masked(Flat):
    """Gemma-2 or BERT: tokens (b, l), and 0 where they are padding, (b, l), to hidden states (b, l, width).

    They are the last ones, normalised; of pipelines with a system prompt (Lumina-2) those in front of the last layer.
    """

    def __init__(self, source: nn.Module, output: str = "last_hidden_state") -> None:
        super().__init__(source)
        self._ahead = output != "last_hidden_state"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.source(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=self._ahead
        )
        states: Tensor = found.hidden_states[-2] if self._ahead else found.last_hidden_state
        return states


class _Qwen(Flat):
    """Tokens (b, l), and 0 where they are padding, (b, l), to the language model's last hidden state (b, l, width)."""

    def __init__(self, source: Any) -> None:
        inner, outer = copy.copy(source.model), copy.copy(source)  # without what sees, and what writes
        inner._modules, outer._modules = {"language_model": source.model.language_model}, {"model": inner}
        super().__init__(outer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        model = self.source.model.language_model
        found = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = found.last_hidden_state
        return states


class _Layers(Flat):
    """Tokens (b, l), and 0 where they are padding, (b, l), to hidden states side by side, (b, l, layers * width).

    Layers behind the last one that is read are none of its graph. Padding in front of a text attends to no token, and
    the denoiser looks at what becomes of it: torch's attention gives zeros, which a softmax in a graph does not.
    """

    def __init__(self, source: nn.Module, layers: Sequence[int]) -> None:
        super().__init__(source)
        self._layers = tuple(layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        before = (places[:, None] >= places) & attention_mask[:, None].bool()  # (b, l, l)
        sees = before.sum(-1, keepdim=True) > 0

        def zeroed(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].where(sees, torch.zeros_like(args[0])),)

        decoder = self.source.get_decoder()
        hooks = [layer.self_attn.o_proj.register_forward_pre_hook(zeroed) for layer in decoder.layers]
        found = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        return torch.cat([found.hidden_states[layer] for layer in self._layers], dim=-1)


def read_layers(pipeline: DiffusionPipeline) -> tuple[int, ...]:
    """The hidden states of its text encoder that a pipeline reads: 0 is the embedding."""
    layers = inspect.signature(type(pipeline).__call__).parameters["text_encoder_out_layers"].default
    return tuple(layers)


def prompt_template(pipeline: DiffusionPipeline) -> list[str]:
    """What a chat model's tokenizer puts before and behind a prompt.

    It is to be answered without thinking aloud, or, where the pipeline has a message of the system, stands behind that.
    """
    need(pipeline, "tokenizer")
    place = "{prompt}"
    tokenizer: Any = pipeline.tokenizer
    system = getattr(pipeline, "system_message", None)
    if system is None:
        told: Any = [{"role": "user", "content": place}]
        options = {"add_generation_prompt": True, "enable_thinking": False}
    else:
        texts = {"system": system, "user": place}
        told = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
        options = {"add_generation_prompt": False}
    written = tokenizer.apply_chat_template(told, tokenize=False, **options)
    before, _, behind = written.partition(place)
    return [before, behind]


def _masks_text(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline tells its text encoder what is padding: then it also gives the mask to its denoiser."""
    encode = getattr(pipeline, "encode_prompt", None)
    return encode is not None and "prompt_attention_mask" in inspect.signature(encode).parameters


def padded(batch: int, length: int, *, dtype: torch.dtype) -> Tensor:
    """(b, l): 1 for text, 0 for padding behind it, one token more in each row."""
    return (torch.arange(length) < (length - torch.arange(batch)[:, None]).clamp_min(1)).to(dtype)


def _sequence(
    name: str,
    model: Any,
    flat: Flat,
    *,
    masked: bool,
    told: Mapping[str, Any] | None = None,
    length: int | None = None,
    output: str = "last_hidden_state",
) -> Component:
    """A text encoder of any length, or always of one; `told` is written beside its configuration."""
    generator, words = torch.Generator().manual_seed(_SEED), model.get_input_embeddings().num_embeddings
    examples = [
        {"input_ids": torch.randint(2, words, (batch, length or tokens), generator=generator)}
        for batch, tokens in ((2, 11), (3, 7), (1, 13))
    ]
    for example in examples if masked else ():
        example["attention_mask"] = padded(*example["input_ids"].shape, dtype=torch.int64)
    axes = {0: "batch"} if length else {0: "batch", 1: "sequence"}
    return Component(
        name=name,
        module=flat,
        inputs=examples[0],
        dynamic_axes={key: axes for key in examples[0]},
        outputs=(output,),
        config={**config_of(model), **(told or {})},
        more_inputs=tuple(examples[1:]),
    )


class _Decoder(nn.Module):
    """Latents (b, channels, h, w) to pixels (b, 3, h s, w s); of an autoencoder of films the first frame.

    Those of AutoencoderKLFlux2 are patches, and of unit variance.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.bn = getattr(vae, "bn", None)
        self.decoder = vae.decoder
        self._films = _draws_films(vae)

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
        self._films = _draws_films(vae)

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


def _draws_films(vae: Any) -> bool:
    return type(vae).__name__ == "AutoencoderKLQwenImage"


def autoencoder(pipeline: DiffusionPipeline, *, height: int, width: int) -> list[Component]:
    """The VAE's decoder and encoder; nothing where the pipeline has none.

    Raises:
        ModelError: it is none of AUTOENCODERS.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return []
    if type(vae).__name__ not in AUTOENCODERS:
        raise ModelError(f"the vae is a {type(vae).__name__}; known are {', '.join(AUTOENCODERS)}")
    scale, dtype, config = vae_scale(vae.config), vae.dtype, config_of(vae)
    channels = vae.bn.num_features if hasattr(vae, "bn") else latent_channels(config)
    sizes = rows(latent_sizes(height, width, vae_scale=scale, multiple=1))
    colours = config.get("in_channels") or config["input_channels"]
    latents = [noise(b, channels, h, w, dtype=dtype) for b, _, (h, w) in sizes]
    pixels = [noise(b, colours, h * scale, w * scale, dtype=dtype) for b, _, (h, w) in sizes]
    decoder = Component(
        name="vae_decoder",
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
