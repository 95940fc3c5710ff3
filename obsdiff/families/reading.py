"""How pipelines read prompts: what they put around them, and their text encoders as they are exported.

    b         batch
    l         text tokens

Names of inputs and outputs are those of optimum's ONNX folders. Networks keep the names of their weights.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff.families import references
from obsdiff.families.parts import SEED, Flat, config_of, noise, padded
from obsdiff_export.component import Component
from obsdiff_runtime.bundle import IMAGE_ENCODER
from obsdiff_runtime.errors import ModelError
from obsdiff_runtime.kinds import PROMPT_TEMPLATE, qwen

CLIP_TOKENS: Final = 77

INSTRUCTION: Final = "complex_human_instruction"
"""Argument of a pipeline's call, and where it is written in the text encoder's configuration for the runtime."""

SYSTEM_PROMPT: Final = "system_prompt"
"""Attribute of a pipeline, what its prompts stand behind, and where it is written likewise."""

_MASKS_LATER: Final = ("LTXPipeline", "LTXImageToVideoPipeline")

_SPECIAL: Final = 2  # tokens at the ends of a text that the instruction is not counted to have


def clip_tokens(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Text tokens of the first text encoder; CLIP's 77, which is what the paper counts, of a denoiser on its own."""
    return int(configs.get("text_encoder", {}).get("max_position_embeddings", CLIP_TOKENS))


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
    """`Family.encode` of one text encoder: embeddings (n, text tokens, width), and which are text, (n, text tokens).

    Of a pipeline that knows no negative prompts, `negative` is empty.
    """
    need(pipeline, "text_encoder", "tokenizer")
    limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    told = {"negative_prompt": list(negative), "do_classifier_free_guidance": bool(negative)}
    known = inspect.signature(pipeline.encode_prompt).parameters
    told = {name: value for name, value in told.items() if name in known}
    with torch.no_grad():
        encoded = pipeline.encode_prompt(prompt=list(prompts), **told, **limit, **more)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    return {key: value for key, value in zip(names, encoded, strict=False) if value is not None}


def instruction(pipeline: DiffusionPipeline) -> list[str]:
    """The lines that the pipeline's call puts before prompts, not negative ones, by default; none where it has none."""
    told = inspect.signature(type(pipeline).__call__).parameters.get(INSTRUCTION)
    return [] if told is None or not told.default else list(told.default)


def instruction_tokens(pipeline: DiffusionPipeline) -> int:
    """Tokens by which a prompt's sequence is longer for that instruction, as SanaPipeline counts them."""
    lines, tokenizer = instruction(pipeline), getattr(pipeline, "tokenizer", None)
    return len(tokenizer.encode("\n".join(lines))) - _SPECIAL if lines and tokenizer is not None else 0


def template_tokens(pipeline: DiffusionPipeline) -> int:
    """Tokens by which every prompt's sequence is longer than what the denoiser reads of it."""
    return int(getattr(pipeline, qwen.DROPPED, 0))


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
            masked = kind == "UMT5EncoderModel" or _masks_text(pipeline)
            found.append(_sequence(name, model, _T5(model), masked=masked))
        elif kind == "BertModel":
            found.append(_sequence(name, model, _Masked(model), masked=True, length=CLIP_TOKENS))
        elif kind == "Gemma2Model":
            prompt = getattr(pipeline, SYSTEM_PROMPT, None)
            told = {INSTRUCTION: instruction(pipeline)} if prompt is None else {SYSTEM_PROMPT: prompt}
            output = "last_hidden_state" if prompt is None else f"hidden_states.{model.config.num_hidden_layers - 1}"
            found.append(_sequence(name, model, _Masked(model, output), masked=True, output=output, told=told))
        elif kind == "Qwen2_5_VLForConditionalGeneration":
            told = {key: getattr(pipeline, key) for key in (qwen.TEMPLATE, qwen.DROPPED)}
            found.append(_sequence(name, model, _Qwen(model), masked=True, told=told))
        elif kind in ("Qwen3Model", "Qwen3ForCausalLM", "Mistral3ForConditionalGeneration"):
            told = {PROMPT_TEMPLATE: prompt_template(pipeline)}
            flat = _Layers(model, read_layers(pipeline))
            found.append(_sequence(name, model, flat, masked=True, told=told, output="prompt_embeds"))
        else:
            raise ModelError(
                f"{name} is a {kind}; known are CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, "
                "UMT5EncoderModel, BertModel, Gemma2Model, Qwen2_5_VLForConditionalGeneration, "
                "Qwen3Model, Qwen3ForCausalLM and Mistral3ForConditionalGeneration"
            )
    return found


class _Vision(Flat):
    """Pixels (b, 3, side, side) to CLIP's states in front of its last layer, (b, tokens, width)."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.source(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-2]
        return states


def image_encoders(pipeline: DiffusionPipeline) -> list[Component]:
    """The image encoder, where the pipeline's denoiser is told what it sees.

    Raises:
        ModelError: it is no CLIPVisionModel, or pictures are made into something else than the middle of them for it.
    """
    model: Any = getattr(pipeline, IMAGE_ENCODER, None)
    if model is None or not references.sees(pipeline.transformer.config):
        return []
    side, processor = int(model.config.image_size), pipeline.image_processor.to_dict()
    steps = [processor.get(f"do_{step}") for step in ("resize", "center_crop", "rescale", "normalize")]
    cut = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if (
        not type(model).__name__.startswith("CLIPVisionModel")
        or not all(steps)
        or any(processor[key] != cut[key] for key in cut)
    ):
        raise ModelError(
            f"{IMAGE_ENCODER} is a {type(model).__name__} that reads {side} pixels a side; known are CLIPVisionModel, "
            "and a processor that scales pictures to that, cuts out their middle and normalises them"
        )
    examples = [{"pixel_values": noise(batch, 3, side, side, dtype=model.dtype)} for batch in (2, 3, 1)]
    return [
        Component(
            name=IMAGE_ENCODER,
            module=_Vision(model),
            inputs=examples[0],
            dynamic_axes={"pixel_values": {0: "batch"}},
            outputs=("states",),
            config=config_of(model),
            more_inputs=tuple(examples[1:]),
        )
    ]


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
    generator = torch.Generator().manual_seed(SEED)
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
        super().__init__(only(source, "language_model"))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        model = self.source.model.language_model
        found = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = found.last_hidden_state
        return states


def only(model: Any, part: str) -> Any:
    """A view of Qwen2.5-VL that has what reads ("language_model") or what sees ("visual"), and nothing that writes."""
    inner, outer = copy.copy(model.model), copy.copy(model)
    inner._modules, outer._modules = {part: getattr(model.model, part)}, {"model": inner}
    return outer


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
    """The hidden states of its text encoder that a pipeline reads: 0 is the embedding.

    Of a pipeline whose call does not say so (Z-Image) those in front of the last layer.
    """
    told = inspect.signature(type(pipeline).__call__).parameters.get("text_encoder_out_layers")
    model: Any = pipeline.text_encoder
    return (model.config.num_hidden_layers - 1,) if told is None else tuple(told.default)


def prompt_template(pipeline: DiffusionPipeline) -> list[str]:
    """What a chat model's tokenizer puts before and behind a prompt.

    It is to be answered, of FLUX.2 without and of Z-Image with thinking aloud, or, where the pipeline has a message of
    the system, stands behind that.

    Raises:
        ModelError: see `need`.
    """
    need(pipeline, "tokenizer")
    place = "{prompt}"
    tokenizer: Any = pipeline.tokenizer
    system = getattr(pipeline, "system_message", None)
    if system is None:
        told: Any = [{"role": "user", "content": place}]
        thinks = not type(pipeline).__name__.startswith("Flux2")
        options = {"add_generation_prompt": True, "enable_thinking": thinks}
    else:
        texts = {"system": system, "user": place}
        told = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
        options = {"add_generation_prompt": False}
    written = tokenizer.apply_chat_template(told, tokenize=False, **options)
    before, _, behind = written.partition(place)
    return [before, behind]


def _masks_text(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline tells its T5 what is padding: then it has the mask for its denoiser, too.

    That of LTX-Video's first versions has it for its denoiser alone.
    """
    encode = None if type(pipeline).__name__ in _MASKS_LATER else getattr(pipeline, "encode_prompt", None)
    return encode is not None and "prompt_attention_mask" in inspect.signature(encode).parameters


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
    generator, words = torch.Generator().manual_seed(SEED), model.get_input_embeddings().num_embeddings
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
