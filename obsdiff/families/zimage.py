"""Z-Image: `ZImageTransformer2DModel`, blocks over the image, over text, then over both as one.

All blocks read four distinct tensors:

    attention_norm1, modulated   attention.to_q, to_k, to_v
    heads                        attention.to_out.0
    ffn_norm1, modulated         feed_forward.w1, w3
    neurons                      feed_forward.w2

The first ones (`noise_refiner`) read the image, those after them (`context_refiner`) text, `layers` both. A neuron is
silu(w1) * w3, a row of each. What attention and feed-forward give is normalised before it is added to the stream, so
that no linear writes it.

diffusers takes lists: each row's latents and its text, without padding. It fills both up to a multiple of 32 tokens by
learned ones, which are looked at and count; what makes rows equally long behind them does not. Here text is padded to
one length, and the denoiser is told where; the graph fills it up likewise. Text token i is at (i + 1, 0, 0), those that
fill it up included, a patch at (text tokens + 1, row, column), and what fills up the image at (0, 0, 0).

Outside of this module the denoiser takes the scheduler's timesteps and gives the velocity of the others, from the image
to noise: its own time runs the other way, and both are part of the graph. What reads images, too (Omni), is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from obsdiff.families import layers, parts, reading
from obsdiff.families.rotations import turning, waves_of
from obsdiff.groups import Consumer, Group, LinearSpec, Producer
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ModelError

name: str = "zimage"
denoiser: str = "transformer"
classes: tuple[str, ...] = ("ZImageTransformer2DModel",)
pipeline: str = "ZImagePipeline"
protect: tuple[int, int] = (1, 1)
vae_scale: int = parts.VAE_SCALE
negatives: bool = True
negative_first: bool = False
described: bool = True
text_mask: str | None = "cap_feats"

_TIMESTEPS: Final = 1000
_TEXT_TOKENS: Final = 512
_SAMPLE_SIZE: Final = 128
_PATCH: Final = 2
_SIDES: Final = f"{_PATCH}-1"
"""Name of the first and of the last linear, by the sides of a patch; the pipeline uses no other."""

_MULTIPLE: Final = 32
"""Text and image each have a multiple of so many tokens."""

_EXAMPLES: Final = (_MULTIPLE + 1, 7, 13)
"""Text tokens of the examples; in the first, one row is filled up to twice as many as another."""

_SEQUENCES: Final = {"noise_refiner": "image", "context_refiner": "text", "layers": "joint"}
"""What the blocks of each list run over, in the order in which they run."""


def linears(denoiser: nn.Module) -> tuple[LinearSpec, ...]:
    """See `Family.linears`. Tiers: into the heads, out of them, into the neurons, out of them.

    Raises:
        ModelError: the denoiser is one that reads images, too.
    """
    config: Any = denoiser.config
    if config.siglip_feat_dim is not None:
        raise ModelError("siglip_feat_dim: this denoiser is told images (Z-Image-Omni), and obsdiff knows only text")
    blocks = ((block, prefix, _inputs(sequence)) for block, (prefix, sequence) in enumerate(_blocks(denoiser)))
    return layers.of_blocks(denoiser, blocks, lambda prefix, linear: None)


def groups(denoiser: nn.Module) -> tuple[Group, ...]:
    """See `Family.groups`."""
    found: list[Group] = []
    for block, (prefix, _) in enumerate(_blocks(denoiser)):
        found.append(layers.heads(denoiser, f"{prefix}.attention", block=block))
        feed = f"{prefix}.feed_forward"
        neurons = layers.neurons_between(
            feed,
            (Producer(name=f"{feed}.w1"), Producer(name=f"{feed}.w3")),
            Consumer(name=f"{feed}.w2"),
            units=layers.size(denoiser.get_submodule(f"{feed}.w2"), "in_features"),
            block=block,
        )
        found.append(neurons)
    return tuple(found)


def tokens(
    config: Mapping[str, Any], *, height: int, width: int, text_tokens: int, vae_scale: int = 8
) -> dict[str, int]:
    """See `Family.tokens`: "image", one a patch, "text", both filled up, and "joint", one behind the other."""
    image = _filled((height // vae_scale // _PATCH) * (width // vae_scale // _PATCH))
    text = _filled(text_tokens)
    return {"image": image, "text": text, "joint": image + text}


def text_tokens(configs: Mapping[str, Mapping[str, Any]], max_sequence_length: int | None) -> int:
    """See `Family.text_tokens`: Qwen3's, of the template and the prompt in it."""
    return _TEXT_TOKENS if max_sequence_length is None else max_sequence_length


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """See `Family.latent_size`: fixed by the pipeline."""
    return (_SAMPLE_SIZE, _SAMPLE_SIZE)


def encode(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    negative: Sequence[str],
    *,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """See `Family.encode`: Qwen3's embeddings (n, text tokens, width), and which of them are text, (n, text tokens).

    The pipeline's call takes them without their padding; see `calls`.

    Raises:
        ModelError: as `Family.encode`.
    """
    reading.need(pipeline, "text_encoder", "tokenizer")
    length, found = text_tokens({}, max_sequence_length), dict[str, Tensor]()
    for prefix, texts in (("", prompts), ("negative_", negative)):
        if not texts:
            continue
        with torch.no_grad():
            told, _ = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False, max_sequence_length=length)
        embeddings = told[0].new_zeros(len(told), length, told[0].shape[-1])
        mask = torch.zeros(len(told), length, dtype=torch.int64, device=told[0].device)
        for row, text in enumerate(told):
            embeddings[row, : len(text)], mask[row, : len(text)] = text, 1
        found |= {f"{prefix}prompt_embeds": embeddings, f"{prefix}prompt_attention_mask": mask}
    return found


def example(
    denoiser: nn.Module, *, batch: int, size: tuple[int, ...], text_tokens: int, pixels: tuple[int, int]
) -> dict[str, Tensor]:
    """See `Family.example`."""
    config: Any = denoiser.config
    return parts.masked_example(denoiser, batch, size, text_tokens, config.cap_feat_dim)


def arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `Family.arguments`: the time that is 0 at noise, images of a frame, and text without its padding."""
    text = inputs["encoder_hidden_states"]
    return {
        "x": list(inputs["hidden_states"][:, :, None].unbind()),
        "t": 1 - inputs["timestep"] / _TIMESTEPS,
        "cap_feats": parts.listed(text, inputs["encoder_attention_mask"]),
    }


class _Flat(parts.Flat):
    """The transformer, without options; (b, channels, h, w) to the same, b rows of s tokens in blocks."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, timestep: Tensor
    ) -> Tensor:
        source, device = self.source, hidden_states.device
        rows, columns = hidden_states.shape[-2] // _PATCH, hidden_states.shape[-1] // _PATCH
        time = self._time(timestep)

        texts = torch.arange(_filled(encoder_hidden_states.shape[1]), device=device)
        length = encoder_attention_mask.to(torch.int64).sum(dim=1)[:, None]
        text = _fill(source.cap_embedder(encoder_hidden_states), texts < length, source.cap_pad_token)
        length = _filled(length)  # (b, 1)
        shown = texts < length  # (b, text tokens)

        own = torch.arange(_filled(rows * columns), device=device) < rows * columns
        image = source.all_x_embedder[_SIDES](parts.patches(hidden_states, _PATCH))
        image = _fill(image, own.expand(image.shape[0], -1), source.x_pad_token)

        first, rotary = _places(own, rows, columns, length), source.rope_embedder
        second = torch.stack([texts + 1, torch.zeros_like(texts), torch.zeros_like(texts)], dim=-1)
        second = second.float().expand(image.shape[0], -1, -1)
        waves = waves_of(first, rotary.theta, rotary.axes_dims)
        for block in source.noise_refiner:
            image = turning(block)(image, None, waves, time)
        waves = waves_of(second, rotary.theta, rotary.axes_dims)
        for block in source.context_refiner:
            text = turning(block)(text, shown, waves)
        both = torch.cat([image, text], dim=1)
        shown = torch.cat([torch.ones_like(image[..., 0], dtype=torch.bool), shown], dim=1)
        waves = waves_of(torch.cat([first, second], dim=1), rotary.theta, rotary.axes_dims)
        for block in source.layers:
            both = turning(block)(both, shown, waves, time)
        velocity = source.all_final_layer[_SIDES](both[:, : rows * columns], c=time)
        return -parts.unpatched(velocity, rows, columns, _PATCH)

    def _time(self, timestep: Tensor) -> Tensor:
        """What blocks are told of it, (b, width)."""
        embedder, scale = self.source.t_embedder, self.source.t_scale
        waves = get_timestep_embedding(
            (1 - timestep / _TIMESTEPS) * scale,
            embedder.frequency_embedding_size,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
        )
        found: Tensor = embedder.mlp(waves.to(embedder.mlp[0].weight.dtype))
        return found


def component(denoiser: nn.Module, *, height: int, width: int, vae_scale: int = 8) -> Component:
    """See `Family.component`."""
    config: Any = denoiser.config
    return parts.denoiser_component(
        _Flat(denoiser),
        example,
        name="transformer",
        output="out_hidden_states",
        latents="hidden_states",
        sizes=parts.latent_sizes(height, width, vae_scale=vae_scale, multiple=_PATCH, limit=min(config.axes_lens[1:])),
        pixels=(height, width),
        text=("encoder_hidden_states", "encoder_attention_mask"),
        text_tokens=_EXAMPLES,
    )


def _inputs(sequence: str) -> layers.Inputs:
    return (
        (0, "attention_norm1", sequence, ("attention.to_q", "attention.to_k", "attention.to_v")),
        (1, "attention.to_out.0", sequence, ("attention.to_out.0",)),
        (2, "ffn_norm1", sequence, ("feed_forward.w1", "feed_forward.w3")),
        (3, "feed_forward.w2", sequence, ("feed_forward.w2",)),
    )


def _blocks(denoiser: nn.Module) -> Iterator[tuple[str, str]]:
    """Name and sequence of each block, in forward order."""
    return layers.in_stages(denoiser, _SEQUENCES)


def _filled(tokens: Any) -> Any:
    """So many tokens, one at least, up to the next multiple: a number, or a tensor of them."""
    return (tokens + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE


def _fill(states: Tensor, own: Tensor, token: Tensor) -> Tensor:
    """States (b, s, width) where `own`, (b, s filled up), says that there are any, and elsewhere the learned token."""
    places = torch.arange(own.shape[1], device=states.device).clamp(max=states.shape[1] - 1)
    return torch.where(own[..., None], states[:, places], token)


def _places(own: Tensor, rows: int, columns: int, length: Tensor) -> Tensor:
    """Of patches (b, s, 3), float32, behind texts of `length` tokens, (b, 1); what fills them up is not `own`, (s,)."""
    count = torch.arange(own.shape[0], device=own.device)
    row, column = count[:rows, None].expand(-1, columns), count[None, :columns].expand(rows, -1)
    filled = count.clamp(max=rows * columns - 1)
    behind = (length + 1).expand(-1, own.shape[0])
    places = [behind, *(axis.flatten()[filled].expand_as(behind) for axis in (row, column))]
    return torch.stack([axis * own for axis in places], dim=-1).float()
