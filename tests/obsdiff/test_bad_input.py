"""Calibrations that go wrong in a running pipeline, for every method: a usable result or an error, never silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff import pruning
from obsdiff.core.gram import Gram, GramAccumulator
from obsdiff.job import given
from obsdiff.methods.table import METHODS
from obsdiff.pruning import Pruned
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff_runtime.errors import CalibrationError, ResourceError

PROMPTS = ["a red circle", "a blue square", "a dog"]
UNSTRUCTURED = "0.5"
REMOVING_UNITS = [name for name, method in METHODS.items() if method.removes_units]


def calibrating(method: str) -> bool:
    return METHODS[method].calibrates


@pytest.fixture
def pipeline(build_pipeline: Callable[..., DiffusionPipeline]) -> Any:
    return build_pipeline("sd3")


def prune(
    pipeline: DiffusionPipeline,
    sparsity: str,
    prompts: list[str] = PROMPTS,
    *,
    stored: torch.dtype = torch.float32,
    **settings: Any,
) -> Pruned:
    loaded = given(pipeline)
    small = {"steps": 2, "height": 32, "width": 32, "max_sequence_length": 2, "batch_size": 2, "draws": 1}
    small |= {"packages": 1, "align": 1, "protect_first": 0, "protect_last": 0}
    asked = Settings(**{"sparsity": sparsity, **small, **settings})
    recipe = resolve(asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=prompts)
    return pruning.prune(pipeline, loaded.family, recipe, stored=stored)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def check(pruned: Pruned, *, worst: float = 1.0) -> None:
    assert all(bool(tensor.isfinite().all()) for tensor in pruned.denoiser.state_dict().values())
    for layer in pruned.layers:
        weight: Any = pruned.denoiser.get_submodule(layer.name).weight
        if layer.pattern == "2:4":
            assert bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all()), layer.name
        assert layer.loss is None or 0 <= layer.loss <= worst


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["2:4", UNSTRUCTURED])
def test_one_prompt_of_fewer_tokens_than_channels_is_enough(
    method: str, sparsity: str, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Gram] = []

    def finished(accumulator: GramAccumulator) -> Gram:
        seen.append(real(accumulator))
        return seen[-1]

    real = GramAccumulator.gram
    monkeypatch.setattr(GramAccumulator, "gram", finished)
    pruned = prune(pipeline, sparsity, PROMPTS[:1], steps=1, draws=1, method=method)
    check(pruned)
    assert calibrating(method) == any(gram.tokens < len(gram.matrix) for gram in seen)


@pytest.mark.parametrize("method", METHODS)
def test_a_neuron_that_never_speaks_loses_its_weights(method: str, pipeline: Any) -> None:
    feed = pipeline.transformer.transformer_blocks[0].ff
    with torch.no_grad():
        feed.net[0].proj.weight[5] = 0
        feed.net[0].proj.bias[5] = 0
    alone = {"method_options": {"metric": 0}}  # else it may be taken to make up for what the others lose
    check(prune(pipeline, "2:4", method=method, **alone))
    silent = (feed.net[2].weight == 0).all(dim=0)
    found = bool(silent.any() if METHODS[method].streams else silent[5])  # a streamed method may move it elsewhere
    assert calibrating(method) == found


@pytest.mark.parametrize("method", REMOVING_UNITS)
def test_a_neuron_that_never_speaks_is_the_first_to_leave(method: str, pipeline: Any) -> None:
    feed = pipeline.transformer.transformer_blocks[0].ff
    with torch.no_grad():
        feed.net[0].proj.weight[5] = 0
        feed.net[0].proj.bias[5] = 0
        feed.net[2].weight[:, 5] = 1e-3  # small, so that magnitude finds it too
    pruned = prune(pipeline, "ffn:0.02", method=method, allocation="uniform")
    check(pruned)
    (kept,) = (units for name, units in pruned.kept.items() if name.startswith("transformer_blocks.0.ff."))
    assert len(kept) < 128
    assert 5 not in kept


@pytest.mark.parametrize("method", METHODS)
def test_one_infinite_batch_names_layer_step_and_prompts_and_changes_nothing(method: str, pipeline: Any) -> None:
    calls: list[None] = []
    bad = 2 if METHODS[method].streams else 4  # fewer calls are made

    def overflow(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        calls.append(None)
        return output.index_fill(-1, torch.tensor([3]), torch.inf) if len(calls) == bad else None

    pipeline.transformer.transformer_blocks[1].ff.net[0].register_forward_hook(overflow)
    before = weights(pipeline.transformer)
    if not calibrating(method):
        check(prune(pipeline, "2:4", method=method))
        assert not calls
        return
    where = r"transformer_blocks\.1\.ff\.net\.2: step 2, prompts 3 to 3: .*infinite"
    if METHODS[method].streams:  # it looks at the output first, before any layer
        where = r"step \d, prompts \d to \d: the denoiser's output is not finite"
    with pytest.raises(CalibrationError, match=where):
        prune(pipeline, "2:4", method=method)
    after = weights(pipeline.transformer)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["2:4", UNSTRUCTURED])
def test_layers_of_equal_weights_lose_their_share(method: str, sparsity: str, pipeline: Any) -> None:
    """Equal weights on channels that a LayerNorm made sum to nothing give next to nothing: no measure for a loss."""
    block = pipeline.transformer.transformer_blocks[1]
    with torch.no_grad():
        block.ff.net[2].weight.fill_(0.5)
        block.attn.to_q.weight.fill_(-1)
        block.attn.to_k.weight.zero_()
    pruned = prune(pipeline, sparsity, method=method, allocation="uniform")
    check(pruned, worst=100)
    zeros = {layer.name.removeprefix("transformer_blocks.1."): layer.zeros for layer in pruned.layers}
    assert (zeros["ff.net.2"], zeros["attn.to_q"]) == (0.5, 0.5)
    assert zeros["attn.to_k"] == (0.5 if METHODS[method].streams else 1.0)  # it is fitted anew, to next to nothing


@pytest.mark.parametrize("method", REMOVING_UNITS)
def test_layers_of_equal_weights_lose_their_units(method: str, pipeline: Any) -> None:
    block = pipeline.transformer.transformer_blocks[1]
    with torch.no_grad():
        block.ff.net[2].weight.fill_(0.5)
        block.attn.to_out[0].weight.zero_()
    pruned = prune(pipeline, "structured:0.25", method=method, allocation="uniform")
    check(pruned)
    assert {len(kept) / pruned.units[name] for name, kept in pruned.kept.items()} == {0.75}


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_beyond_the_range_it_is_stored_in_names_the_layer(method: str, pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[1].attn.to_q.weight[0, 0] = 1e6
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.1\.attn\.to_q: .*not finite in float16"):
        prune(pipeline, "2:4", method=method, stored=torch.float16)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_never_reached_is_an_error_that_names_it(method: str, pipeline: Any) -> None:
    pipeline.transformer.transformer_blocks[1].ff.forward = torch.zeros_like
    if calibrating(method):
        with pytest.raises(CalibrationError, match=r"transformer_blocks\.1\.ff\.net\.0\.proj: no token reached"):
            prune(pipeline, "2:4", method=method)
    else:
        check(prune(pipeline, "2:4", method=method))  # asks no activation


@pytest.mark.parametrize(
    ("sparsity", "method"),
    [*(("2:4", method) for method in METHODS), *(("structured:0.25", method) for method in REMOVING_UNITS)],
)
def test_a_gram_budget_below_one_tier_is_an_error_before_any_step(sparsity: str, method: str, pipeline: Any) -> None:
    """A method that keeps no grams stays within any budget."""
    pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    if calibrating(method):
        with pytest.raises(ResourceError, match=r"grams of transformer_blocks\.\d\.\S+ .*; raise --gram-budget"):
            prune(pipeline, sparsity, method=method, gram_budget="4KiB")
    else:
        check(prune(pipeline, sparsity, method=method, gram_budget="4KiB"))


@pytest.mark.parametrize("method", METHODS)
def test_a_gram_budget_that_can_be_met_gives_a_result_as_good(method: str, pipeline: Any) -> None:
    check(prune(pipeline, "2:4", method=method, gram_budget="1MiB"))
