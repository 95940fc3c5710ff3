"""Padded text, which the denoiser masks out: moments against those of the unpadded tokens alone, in float64."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff import calibration, glances, moments, padding, pruning, ranges, trajectories
from obsdiff.families import chroma, generic, lumina2, pixart, sd3, zimage
from obsdiff.groups import LinearSpec, Write
from obsdiff.job import given
from obsdiff.methods import Layer
from obsdiff.methods.table import METHODS
from obsdiff.recipe import Recipe
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff.trajectories import Guidance
from obsdiff_export.formats import FORMATS
from obsdiff_runtime.errors import CalibrationError, ModelError

PROMPTS = ["a red circle on a blue square", "dog", "a small cat"]
KEYS = ("transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_v")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Products are taken in float32."""

Build = Callable[..., DiffusionPipeline]
LENGTHS = [("pixart", 40), ("pixart_sigma", 300)]
"""Text tokens; 300 are more than count of a row that is not padded."""


def recipe_for(pipeline: DiffusionPipeline, **settings: Any) -> Recipe:
    loaded = given(pipeline)
    small: dict[str, Any] = {"steps": 2, "height": 32, "width": 32, "batch_size": 2, "max_sequence_length": 40}
    small |= {"sparsity": "2:4"} | ({"draws": 1} if settings.get("method", "streamed") == "streamed" else {})
    return resolve(
        Settings(**{**small, **settings}),
        model="tiny",
        family=loaded.family,
        defaults=loaded.defaults,
        prompts=PROMPTS,
    )


@torch.no_grad()
def unpadded(pipeline: Any, prompts: calibration.Prompts) -> Tensor:
    """What to_k and to_v read of the text, without padding, (tokens, width), float64.

    It is the same in every step, so that the steps' weights make no difference.
    """
    projection = copy.deepcopy(pipeline.transformer.caption_projection).double()
    found = []
    for prefix in ("prompt", "negative_prompt"):
        masks = prompts.embeddings[f"{prefix}_attention_mask"]
        for text, mask in zip(prompts.embeddings[f"{prefix}_embeds"], masks, strict=True):
            found.append(projection(text[: int(mask.sum())].double()))
    lengths = [len(tokens) for tokens in found]
    assert len(set(lengths)) > 2
    assert max(lengths) < masks.shape[1]
    return torch.cat(found)


@pytest.mark.parametrize(("kind", "length"), LENGTHS)
def test_calibration_counts_the_unpadded_tokens_alone(kind: str, length: int, build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline(kind)
    recipe = recipe_for(pipeline, method="obsdiff", max_sequence_length=length)
    linears = pixart.linears(pipeline.transformer)
    prompts = calibration.encode(pipeline, pixart, PROMPTS, recipe.sampling)
    grams = calibration.calibrate(pipeline, pixart, linears, prompts, recipe.sampling, time_weights="log-decrease")
    gram, x = grams["encoder_hidden_states"], unpadded(pipeline, prompts)
    torch.testing.assert_close(gram.matrix, x.T @ x / len(x), **CLOSE)
    torch.testing.assert_close(gram.mean, x.mean(0), **CLOSE)
    assert gram.tokens == 2 * len(x)  # steps
    assert grams["transformer_blocks.0.attn2"].tokens == 2 * 6 * 64  # of the image all count


@pytest.mark.parametrize(("kind", "length"), LENGTHS)
@torch.no_grad()
def test_streamed_moments_count_the_unpadded_tokens_alone(
    kind: str, length: int, build_pipeline: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = build_pipeline(kind)
    recipe = recipe_for(pipeline, max_sequence_length=length, time_weights="uniform")
    prompts = calibration.encode(pipeline, pixart, PROMPTS, recipe.sampling)
    x = unpadded(pipeline, prompts)
    dense = {name: copy.deepcopy(pipeline.transformer.get_submodule(name)).double() for name in KEYS}
    seen: dict[str, Layer] = {}
    solve = METHODS["streamed"].prune_weights

    def keep(layers: Sequence[Layer], *args: Any) -> Any:
        seen.update({layer.name: layer for layer in layers})
        return solve(layers, *args)

    monkeypatch.setattr(METHODS["streamed"], "prune_weights", keep)
    pruning.prune(pipeline, pixart, recipe)
    for name, linear in dense.items():
        layer, y = seen[name], linear(x)
        assert layer.gram is not None
        assert layer.target is not None
        torch.testing.assert_close(layer.gram, x.T @ x / len(x), **CLOSE)
        torch.testing.assert_close(layer.mean, x.mean(0), **CLOSE)
        torch.testing.assert_close(layer.target.cross, y.T @ x / len(x), **CLOSE)
        torch.testing.assert_close(layer.target.mean, y.mean(0), **CLOSE)
        torch.testing.assert_close(layer.target.energy, y.square().mean(0), **CLOSE)


@torch.no_grad()
def test_of_text_and_image_in_one_sequence_the_padding_behind_a_row_is_left_out(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("lumina2")
    recipe = recipe_for(pipeline, method="obsdiff", max_sequence_length=60, height=64, width=64)
    prompts = calibration.encode(pipeline, lumina2, PROMPTS, recipe.sampling)
    text = sum(int(prompts.embeddings[f"{prefix}_attention_mask"].sum()) for prefix in ("prompt", "negative_prompt"))
    steps, image, read = 2, 16, []

    def see(_: nn.Module, args: tuple[Tensor]) -> None:
        read.append(args[0].double())

    handle = pipeline.transformer.layers[0].norm1.register_forward_pre_hook(see)
    linears = lumina2.linears(pipeline.transformer)
    grams = calibration.calibrate(pipeline, lumina2, linears, prompts, recipe.sampling, time_weights="uniform")
    handle.remove()
    assert sum(row.shape[0] * row.shape[1] for row in read) > steps * (text + 6 * image)
    assert grams["context_refiner.0.norm1"].tokens == steps * text
    assert grams["noise_refiner.0.norm1"].tokens == steps * 6 * image
    assert grams["layers.0.norm1"].tokens == steps * (text + 6 * image)
    assert all(gram.matrix.isfinite().all() for gram in grams.values())


@torch.no_grad()
def test_what_fills_up_text_and_image_of_z_image_counts_and_what_pads_a_batch_does_not(build_pipeline: Build) -> None:
    """Text around each prompt is 18 tokens long; an image has 16 patches of the 32 tokens that it is filled up to."""
    pipeline: Any = build_pipeline("zimage")
    recipe = recipe_for(pipeline, method="obsdiff", max_sequence_length=60, height=32, width=8)
    prompts = calibration.encode(pipeline, zimage, PROMPTS, recipe.sampling)
    linears, steps, image = zimage.linears(pipeline.transformer), 2, 32
    grams = calibration.calibrate(pipeline, zimage, linears, prompts, recipe.sampling, time_weights="uniform")
    text = 64 + 5 * 32
    assert grams["noise_refiner.0.attention_norm1"].tokens == steps * 6 * image
    assert grams["context_refiner.0.attention_norm1"].tokens == steps * text
    assert grams["layers.0.attention_norm1"].tokens == steps * (text + 6 * image)
    calls = trajectories.record(pipeline, zimage, prompts, recipe.sampling, computed_steps=2, kept_steps=2)
    assert [[len(text) for text in call.arguments[0][2]] for call in calls[::2]] == [[18, 18, 47, 21], [18, 29]]
    assert calls[0].masks["joint"].sum(1).tolist() == [64, 64, 96, 64]


@torch.no_grad()
def test_of_chroma_s_text_all_but_one_token_of_its_padding_is_left_out(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("chroma")
    recipe = recipe_for(pipeline, method="obsdiff")
    prompts = calibration.encode(pipeline, chroma, PROMPTS, recipe.sampling)
    text = sum(len(ids) + 1 for ids in pipeline.tokenizer([*PROMPTS, *[""] * 3])["input_ids"])
    linears, steps, image = chroma.linears(pipeline.transformer), 2, 64
    grams = calibration.calibrate(pipeline, chroma, linears, prompts, recipe.sampling, time_weights="uniform")
    assert grams["transformer_blocks.0.norm1_context"].tokens == steps * text
    assert grams["transformer_blocks.0.norm1"].tokens == steps * 6 * image
    assert grams["single_transformer_blocks.1.proj_out"].tokens == steps * (text + 6 * image)


@torch.no_grad()
def test_a_long_sequence_of_text_and_image_counts_at_evenly_spaced_tokens() -> None:
    block, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(2, 1000, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(1000) < torch.tensor([1000, 400])[:, None]
    spaced = torch.linspace(0, 999, glances.TOKENS).round().long()
    linear = LinearSpec(name="b.0", block=0, tier=0, reads="x", in_features=6, out_features=6, tokens="joint")
    look, _ = glances.glance(block, "b", [linear], ((x,), {}), want="inputs", streams=False, masks={"joint": mask})
    assert torch.equal(look.inputs["b.0"], x[:, spaced][mask[:, spaced]])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pixart", "lumina2", "zimage", "chroma"])
def test_rows_of_guidance_are_combined_where_none_of_their_tokens_is_masked(kind: str, build_pipeline: Build) -> None:
    """Lumina-2's pipeline calls the denoiser twice."""
    pipeline: Any = build_pipeline(kind)
    recipe, family = recipe_for(pipeline, height=64, width=64), given(pipeline).family
    prompts = calibration.encode(pipeline, family, PROMPTS[:2], recipe.sampling)
    calls = trajectories.record(pipeline, family, prompts, recipe.sampling, computed_steps=2, kept_steps=2)
    assert [call.paired for call in calls] == [True] * 2
    assert all(len(mask) == 4 for call in calls for mask in call.masks.values())
    linear = LinearSpec(name="q", block=0, tier=0, reads="x", in_features=4, out_features=3, tokens="joint")
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    for inputs, outputs, combined in ((x, y, True), (x.flatten(0, 1), y.flatten(0, 1), False)):
        grams = []
        for guidance in (Guidance(4.0), None):
            sums = moments.TierMoments([linear], torch.device("cpu"), guidance, 0.3)
            sources = {"q": (0, inputs.shape)}
            seen = glances.Glance(inputs={"q": inputs}, outputs={"q": outputs}, bases={}, gates={}, sources=sources)
            sums.add(seen, seen, 1.0, paired=True)
            grams.append(sums.finish(0)[0]["x"].matrix)
        assert torch.equal(*grams) != combined


@torch.no_grad()
def test_a_cross_attention_that_no_family_describes_counts_unpadded_tokens_alone(
    build_pipeline: Callable[..., DiffusionPipeline],
) -> None:
    pipeline: Any = build_pipeline("sana")
    recipe = recipe_for(pipeline, method="obsdiff", max_sequence_length=None, height=64, width=64)
    prompts = calibration.encode(pipeline, generic, PROMPTS, recipe.sampling)
    read: list[Tensor] = []

    def see(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = pipeline.transformer.caption_projection(kwargs["encoder_hidden_states"])
        texts = pipeline.transformer.caption_norm(x)
        masks = kwargs["encoder_attention_mask"]
        assert not masks.all()
        read.extend(text[: int(mask.sum())].double() for text, mask in zip(texts, masks, strict=True))

    handle = pipeline.transformer.register_forward_pre_hook(see, with_kwargs=True)
    linears = generic.linears(pipeline.transformer)
    grams = calibration.calibrate(pipeline, generic, linears, prompts, recipe.sampling, time_weights="uniform")
    handle.remove()
    x = torch.cat(read)
    text = {linear.name for linear in linears if linear.tokens == "text"}
    assert text == {f"transformer_blocks.{block}.attn2.to_{which}" for block in range(3) for which in "kv"}
    for name in text:
        assert grams[name].tokens == len(x)
        torch.testing.assert_close(grams[name].matrix, x.T @ x / len(x), **CLOSE)


def noisy(encode: Callable[..., dict[str, Tensor]], *args: Any, **options: Any) -> dict[str, Tensor]:
    """What `encode` gives, with noise for padding."""
    given = encode(*args, **options)
    for prefix in ("prompt", "negative_prompt"):
        text, mask = given[f"{prefix}_embeds"], given[f"{prefix}_attention_mask"].bool()
        noise = 30 * torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
        given[f"{prefix}_embeds"] = torch.where(mask[..., None], text, noise)
    return given


@pytest.mark.parametrize(
    ("kind", "method", "sparsity"),
    [
        ("pixart", "streamed", "2:4"),
        ("pixart", "streamed", "0.5"),
        ("pixart", "obsdiff", "2:4"),
        ("pixart", "sparsegpt", "2:4"),
        ("pixart", "wanda", "2:4"),
        ("pixart", "dsnot", "0.5"),
        ("lumina2", "streamed", "2:4"),
        ("lumina2", "obsdiff", "structured:0.4"),
        ("zimage", "streamed", "2:4"),
        ("chroma", "streamed", "2:4"),
    ],
)
def test_what_padding_holds_changes_no_bit(
    kind: str, method: str, sparsity: str, build_pipeline: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, family = [], {"pixart": pixart, "lumina2": lumina2, "zimage": zimage, "chroma": chroma}[kind]
    for encode in (family.encode, partial(noisy, family.encode)):
        monkeypatch.setattr(family, "encode", encode)
        pipeline: Any = build_pipeline(kind)
        recipe = recipe_for(pipeline, method=method, sparsity=sparsity)
        pruning.prune(pipeline, family, recipe)
        weights.append(pipeline.transformer.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@torch.no_grad()
def test_ranges_are_those_of_the_unpadded_tokens(build_pipeline: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixart, "encode", partial(noisy, pixart.encode))
    pipeline: Any = build_pipeline("pixart")
    recipe = recipe_for(pipeline)
    prompts = calibration.encode(pipeline, pixart, PROMPTS, recipe.sampling)
    calls = trajectories.record(pipeline, pixart, prompts, recipe.sampling, computed_steps=2, kept_steps=2)
    linears = pixart.linears(pipeline.transformer)
    streams = ranges.observe(
        pipeline.transformer, linears, calls, format=FORMATS["int8"], dtype=torch.float32, outputs=True
    )
    x = unpadded(pipeline, prompts)
    text = streams.inputs["encoder_hidden_states"]
    assert text.tokens == 2 * len(x)
    assert text.largest == pytest.approx(float(x.abs().max()), rel=1e-5)
    torch.testing.assert_close(text.moment, 2 * x.square().sum(0), **CLOSE)
    for name in KEYS:
        y = copy.deepcopy(pipeline.transformer.get_submodule(name)).double()(x)
        assert streams.outputs[name].largest == pytest.approx(float(y.abs().max()), rel=1e-5)
    assert streams.inputs["transformer_blocks.0.attn2"].tokens == 2 * 6 * 64


@torch.no_grad()
def test_a_padded_stream_and_its_gates_are_left_out_too() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.gate = nn.Linear(6, 6), Gate()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate(x)[1].unsqueeze(1) * self.out(x)

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.sigmoid(x[:, 0])

    block, x = Residual(), torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([2, 5, 1])[:, None]
    linear = LinearSpec(
        name="block.out",
        block=0,
        tier=0,
        reads="x",
        in_features=6,
        out_features=6,
        tokens="text",
        writes=Write(stream="block.gate", gate=("block.gate", 1)),
    )
    seen = partial(glances.glance, block, "block", [linear], ((x,), {}), streams=True, masks={"text": mask})
    (inputs, _), (look, _) = seen(want="inputs"), seen(want="outputs")
    assert torch.equal(inputs.inputs["block.out"], x[mask])
    torch.testing.assert_close(look.outputs["block.out"], block.out(x[mask]))
    assert torch.equal(look.bases["block.out"], x[mask])
    gate = torch.sigmoid(x[:, 0])
    assert torch.equal(torch.as_tensor(look.gates["block.out"]), gate[[0, 0, 1, 1, 1, 1, 1, 2]])


def test_without_a_mask_every_token_counts() -> None:
    assert padding.masks(sd3, nn.Identity(), {"encoder_attention_mask": torch.ones(1, 2)}) == {}
    assert padding.masks(pixart, nn.Identity(), {"encoder_attention_mask": None}) == {}
    assert padding.masks(pixart, nn.Identity(), {}) == {}


def test_a_mask_that_is_a_bias_is_refused() -> None:
    with pytest.raises(ModelError, match=r"encoder_attention_mask .* \(2, 1, 7\)"):
        padding.masks(pixart, nn.Identity(), {"encoder_attention_mask": torch.zeros(2, 1, 7)})


def test_a_mask_of_another_sequence_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"\(2, 7\).*\(2, 9\)"):
        padding.unpadded(torch.zeros(2, 9, 4), torch.ones(2, 7, dtype=torch.bool))
