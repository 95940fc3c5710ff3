"""Moments of a tier against brute force in float64 on stored activations."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinds import EVERY, latents_of
from obsdiff import glances, pausing, pointwise
from obsdiff.families import references
from obsdiff.families.table import family_of
from obsdiff.glances import TOKENS, Glance
from obsdiff.groups import LinearSpec, Write
from obsdiff.moments import TierMoments
from obsdiff.pausing import PausedPass
from obsdiff.residuals import block_modules
from obsdiff.trajectories import Guidance
from obsdiff_runtime.errors import CalibrationError

ROWS, IN, OUT = 3, 6, 4
WEIGHTS = (0.8, 1.2)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Products are taken in float32."""


def spec(name: str, reads: str = "x") -> LinearSpec:
    return LinearSpec(
        name=name, block=0, tier=0, reads=reads, in_features=IN, out_features=OUT, tokens="image", writes=None
    )


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    bases: Mapping[str, Tensor] | None = None,
    gates: Mapping[str, Tensor | float] | None = None,
) -> Glance:
    sources = {name: (value.data_ptr(), value.shape) for name, value in inputs.items()}
    return Glance(inputs=inputs, outputs=outputs, bases=bases or {}, gates=gates or {}, sources=sources)


def calls(tokens: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Per call x of the pruned stream and y of the dense one, neither centred."""
    return [
        (noise(ROWS, tokens, IN, seed=2 * index) + 1, noise(ROWS, tokens, OUT, seed=2 * index + 1) - 2)
        for index in range(len(WEIGHTS))
    ]


def weighted(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Everything as (all tokens, width), float64, and the weight of every token, (all tokens, 1)."""
    wide = [torch.cat([values[place].double().flatten(0, -2) for values in parts]) for place in range(len(parts[0]))]
    each = [torch.full((values[0].flatten(0, -2).shape[0], 1), w) for values, w in zip(parts, WEIGHTS, strict=True)]
    return (*wide, torch.cat(each).double())


def test_gram_mean_cross_and_energy_are_those_of_the_tokens() -> None:
    sums = TierMoments([spec("q")], torch.device("cpu"))
    for (x, y), weight in zip(calls(), WEIGHTS, strict=True):
        sums.add(seen({"q": torch.zeros_like(x)}, {"q": y}), seen({"q": x}, {"q": torch.zeros_like(y)}), weight)
    grams, targets = sums.finish(0.5)
    x, y, w = weighted(calls())  # type: ignore[arg-type]
    gram, target, total = grams["x"], targets["q"], w.sum()
    torch.testing.assert_close(gram.matrix, (w * x).T @ x / total, **CLOSE)
    torch.testing.assert_close(gram.mean, (w * x).sum(0) / total, **CLOSE)
    torch.testing.assert_close(target.cross, (w * y).T @ x / total, **CLOSE)
    torch.testing.assert_close(target.mean, (w * y).sum(0) / total, **CLOSE)
    torch.testing.assert_close(target.energy, (w * y.square()).sum(0) / total, **CLOSE)
    assert gram.tokens == len(x)


def test_linears_that_share_an_input_share_a_gram_and_have_targets_of_their_own() -> None:
    x, y = calls()[0]
    sums = TierMoments([spec("q"), spec("k"), spec("v", reads="other")], torch.device("cpu"))
    outputs = {"q": y, "k": 2 * y, "v": y}
    sums.add(seen({}, outputs), seen({"q": x, "k": x, "v": x + 1}, {}), 1.0)
    grams, targets = sums.finish(0.0)
    assert grams.keys() == {"x", "other"}
    torch.testing.assert_close(targets["k"].cross, 2 * targets["q"].cross)
    torch.testing.assert_close(targets["k"].energy, 4 * targets["q"].energy)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("repair", [0.0, 0.5, 1.0])
def test_the_target_makes_up_for_the_gap_of_the_streams(repair: float, gated: bool) -> None:
    """y + r a g d / E[g^2]: d what the pruned stream lacks, a what brings g^2 d / E[g^2] closest to d in a channel."""
    sums = TierMoments([spec("out")], torch.device("cpu"))
    parts: list[tuple[Tensor, ...]] = []
    for index, ((x, y), weight) in enumerate(zip(calls(), WEIGHTS, strict=True)):
        gate = noise(ROWS, 1, OUT, seed=10 + index) if gated else torch.ones(ROWS, 1, OUT)
        before = [noise(*y.shape, seed=seed + index) for seed in (30, 40)]
        gates: dict[str, Tensor | float] = {"out": gate} if gated else {}
        dense = seen({"out": x}, {"out": y}, {"out": before[0]}, gates)
        sums.add(dense, seen({"out": x}, {"out": torch.zeros_like(y)}, {"out": before[1]}, gates), weight)
        parts.append((x, y, before[0] - before[1], gate.expand_as(y)))
    target = sums.finish(repair)[1]["out"]
    x, y, d, g, w = weighted(parts)
    total = w.sum()
    mean = (w * g.square()).sum(0) / total
    pushed = g.square() * d / mean
    best = ((w * pushed * d).sum(0) / (w * pushed.square()).sum(0)).clamp_max(1)
    wanted = y + repair * best * g * d / mean
    torch.testing.assert_close(target.cross, (w * wanted).T @ x / total, **CLOSE)
    torch.testing.assert_close(target.mean, (w * wanted).sum(0) / total, **CLOSE)
    torch.testing.assert_close(target.energy, (w * wanted.square()).sum(0) / total, **CLOSE)


def test_equal_streams_leave_the_target_what_the_dense_model_computes() -> None:
    x, y = calls()[0]
    stream = noise(*y.shape, seed=7)
    sums = TierMoments([spec("out")], torch.device("cpu"))
    both = seen({"out": x}, {"out": y}, {"out": stream}, {"out": 0.3})
    sums.add(both, both, 1.0)
    plain = TierMoments([spec("out")], torch.device("cpu"))
    plain.add(seen({"out": x}, {"out": y}), seen({"out": x}, {"out": y}), 1.0)
    torch.testing.assert_close(sums.finish(1.0)[1]["out"].cross, plain.finish(0.0)[1]["out"].cross)


def test_a_gate_that_is_shut_asks_for_nothing() -> None:
    x, y = calls()[0]
    gate = torch.ones(ROWS, 1, OUT)
    gate[..., 0] = 0
    sums = TierMoments([spec("out")], torch.device("cpu"))
    dense, pruned = (
        seen({"out": x}, {"out": y}, {"out": noise(*y.shape, seed=seed)}, {"out": gate}) for seed in (1, 2)
    )
    sums.add(dense, pruned, 1.0)
    target = sums.finish(1.0)[1]["out"]
    assert bool(target.cross.isfinite().all())
    torch.testing.assert_close(target.mean[0], y[..., 0].double().mean(), **CLOSE)


@torch.no_grad()
def test_tokens_are_taken_at_the_same_evenly_spaced_places_of_everything() -> None:
    tokens = 2 * TOKENS + 3
    places = torch.linspace(0, tokens - 1, TOKENS).round().long()
    block, x = Residual(), noise(ROWS, tokens, IN, seed=0)
    linear = replace(spec("block.out"), out_features=IN, writes=Write(stream="block.gate", gate=("block.gate", 1)))
    wanted, result = glances.glance(block, "block", [linear], ((x,), {}), want="outputs", streams=True)
    look, nothing = glances.glance(block, "block", [linear], ((x,), {}), want="inputs", streams=True)
    assert result is nothing is None
    kept = x[:, places]
    assert torch.equal(look.inputs["block.out"], kept)
    torch.testing.assert_close(wanted.outputs["block.out"], block.out(kept))
    assert all(torch.equal(each.bases["block.out"], kept) for each in (wanted, look))
    assert look.sources["block.out"] == (x.data_ptr(), x.shape)


class Residual(nn.Module):
    """x + gate * out(x)."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.sigmoid(x[:, 0])  # (rows, width)

    def __init__(self) -> None:
        super().__init__()
        self.out, self.gate = nn.Linear(IN, IN), self.Gate()

    def forward(self, x: Tensor) -> Tensor:
        _, gate = self.gate(x)
        return x + gate.unsqueeze(1) * self.out(x)


@torch.no_grad()
def test_a_whole_run_gives_what_the_block_gives_and_keeps_no_input() -> None:
    block, x = Residual(), noise(ROWS, 5, IN, seed=0)
    linear = replace(spec("block.out"), out_features=IN)
    look, result = glances.glance(block, "block", [linear], ((x,), {}), want="result", streams=False)
    assert torch.equal(result, block(x))
    assert torch.equal(look.outputs["block.out"], block.out(x))
    assert not look.inputs
    assert not look.bases


def test_half_precision_is_summed_in_wider_numbers() -> None:
    x, y = calls()[0]
    sums = TierMoments([spec("q")], torch.device("cpu"))
    sums.add(seen({}, {"q": y.half()}), seen({"q": x.half()}, {}), 1.0)
    grams, targets = sums.finish(0.0)
    kept, wanted = x.half().double().flatten(0, 1), y.half().double().flatten(0, 1)
    torch.testing.assert_close(grams["x"].matrix, kept.T @ kept / len(kept), **CLOSE)
    torch.testing.assert_close(targets["q"].cross, wanted.T @ kept / len(kept), **CLOSE)


def test_linears_that_do_not_share_their_input_are_refused() -> None:
    x, y = calls()[0]
    sums = TierMoments([spec("q"), spec("k")], torch.device("cpu"))
    with pytest.raises(CalibrationError, match="k and q were taken to read the same input and do not"):
        sums.add(seen({}, {"q": y, "k": y}), seen({"q": x, "k": x.clone()}, {}), 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stream", ["dense", "pruned"])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_layer(stream: str, value: float) -> None:
    x, y = calls()[0]
    (y if stream == "dense" else x)[1, 2, 3] = value
    sums = TierMoments([spec("block.q")], torch.device("cpu"))
    with pytest.raises(CalibrationError, match=r"block\.q: the .*not finite"):
        sums.add(seen({}, {"block.q": y}), seen({"block.q": x}, {}), 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["dense", "pruned"])
def test_a_residual_stream_that_is_not_finite_is_an_error_that_names_the_layer(place: str, value: float) -> None:
    x, y = calls()[0]
    streams = {name: noise(*y.shape, seed=1) for name in ("dense", "pruned")}
    streams[place][0, 0, 0] = value
    sums = TierMoments([spec("block.out")], torch.device("cpu"))
    dense, pruned = (
        seen({"block.out": x}, {"block.out": y}, {"block.out": stream}, {"block.out": 1.0})
        for stream in streams.values()
    )
    with pytest.raises(CalibrationError, match=r"block\.out: .*not finite"):
        sums.add(dense, pruned, 1.0)


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_a_glance_sees_what_hooks_on_the_whole_model_see(kind: str, build_denoiser: Callable[..., nn.Module]) -> None:
    denoiser: Any = build_denoiser(kind)
    family = family_of(denoiser)
    size = {"wan": (4, 8), "ltx": (2, 4)}.get(kind, latents_of(kind))  # no more tokens than count
    inputs = family.example(denoiser, batch=2, size=size, text_tokens=7, pixels=(24, 32))
    call = (), {**family.arguments(inputs), "return_dict": False}
    linears = family.linears(denoiser)
    expected = _hooked(denoiser, [linear.name for linear in linears], call)
    names = block_modules(linears)
    with pausing.gated([denoiser.get_submodule(name) for name in names]):
        waiting = PausedPass(denoiser, call)
        for index, name in enumerate(names):
            block = denoiser.get_submodule(name)
            for tier in sorted({linear.tier for linear in linears if linear.block == index}):
                mine = [linear for linear in linears if (linear.block, linear.tier) == (index, tier)]
                look = partial(glances.glance, name=name, linears=mine, arguments=waiting.arguments, streams=True)
                (inputs, _), (outputs, _) = (look(copy.deepcopy(block), want=each) for each in ("inputs", "outputs"))
                for linear in mine:
                    module = denoiser.get_submodule(linear.name)
                    read, given = (pointwise.tokens(module, value) for value in expected[linear.name])
                    assert torch.equal(inputs.inputs[linear.name], read)
                    assert torch.equal(outputs.outputs[linear.name], given)
                writers = {linear.name for linear in mine if linear.writes is not None}
                assert inputs.bases.keys() == outputs.bases.keys() == writers
                assert all(outputs.bases[each].shape == outputs.outputs[each].shape for each in writers)
            waiting.resume(pausing.run(block, waiting.arguments))


def _hooked(denoiser: nn.Module, names: list[str], call: pausing.Arguments) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        denoiser.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: found.__setitem__(name, (args[0], output))
        )
        for name in names
    ]
    denoiser(*call[0], **call[1])
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_the_stream_before_a_linear_does_not_depend_on_what_it_writes(
    kind: str, build_denoiser: Callable[..., nn.Module]
) -> None:
    """The oracle for streams and gates: with another bias, stream less gate times output must stay what it was."""
    denoiser: Any = build_denoiser(kind).double()
    family = family_of(denoiser)
    linears = [linear for linear in family.linears(denoiser) if linear.writes is not None]
    inputs = family.example(denoiser, batch=2, size=latents_of(kind), text_tokens=7, pixels=(24, 32))
    names = block_modules(family.linears(denoiser))
    with pausing.gated([denoiser.get_submodule(name) for name in names]):
        waiting = PausedPass(denoiser, ((), {**family.arguments(inputs), "return_dict": False}))
        for index, name in enumerate(names):
            block = denoiser.get_submodule(name)
            for linear in (linear for linear in linears if linear.block == index):
                changed = copy.deepcopy(block)
                writer: Any = changed.get_submodule(linear.name.removeprefix(f"{name}."))
                bias = writer.weight.new_zeros(len(writer.weight)) if writer.bias is None else writer.bias
                writer.bias = nn.Parameter(bias + 0.5)
                before, after = (
                    glances.glance(each, name, [linear], waiting.arguments, want="outputs", streams=True)[0]
                    for each in (block, changed)
                )
                torch.testing.assert_close(after.outputs[linear.name], before.outputs[linear.name] + 0.5)
                torch.testing.assert_close(after.bases[linear.name], before.bases[linear.name])
            waiting.resume(pausing.run(block, waiting.arguments))


@torch.no_grad()
def test_a_pixart_block_adds_gate_times_output_to_each_stream(build_denoiser: Callable[..., nn.Module]) -> None:
    denoiser: Any = build_denoiser("pixart").double()
    family = family_of(denoiser)
    inputs = family.example(denoiser, batch=2, size=(12, 16), text_tokens=7, pixels=(24, 32))
    linears = [linear for linear in family.linears(denoiser) if linear.block == 0 and linear.writes is not None]
    name = "transformer_blocks.0"
    with pausing.gated([denoiser.get_submodule(name)]):
        waiting = PausedPass(denoiser, ((), {**family.arguments(inputs), "return_dict": False}))
        look, result = glances.glance(
            denoiser.get_submodule(name), name, linears, waiting.arguments, want="result", streams=True
        )
    after = [look.bases[each.name] + look.gates.get(each.name, 1.0) * look.outputs[each.name] for each in linears]
    for found, expected in zip(after, [*(look.bases[each.name] for each in linears[1:]), result], strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_an_auraflow_block_adds_gate_times_feed_forward_to_each_stream(
    build_denoiser: Callable[..., nn.Module],
) -> None:
    denoiser: Any = build_denoiser("auraflow", num_mmdit_layers=1, num_single_dit_layers=1).double()
    family = family_of(denoiser)
    inputs = family.example(denoiser, batch=2, size=(12, 16), text_tokens=7, pixels=(24, 32))
    names = block_modules(family.linears(denoiser))
    with pausing.gated([denoiser.get_submodule(name) for name in names]):
        waiting = PausedPass(denoiser, ((), {**family.arguments(inputs), "return_dict": False}))
        for index, name in enumerate(names):
            writers = [each for each in family.linears(denoiser) if each.block == index and each.writes is not None]
            block = denoiser.get_submodule(name)
            look, result = glances.glance(block, name, writers, waiting.arguments, want="result", streams=True)
            after = [look.bases[each.name] + look.gates[each.name] * look.outputs[each.name] for each in writers]
            streams = reversed(result) if isinstance(result, tuple) else [result]
            for found, expected in zip(after, streams, strict=True):
                torch.testing.assert_close(found, expected)
            waiting.resume(result)


@torch.no_grad()
def test_a_flux2_block_adds_gates_that_it_is_told_times_output_to_each_stream(
    build_denoiser: Callable[..., nn.Module],
) -> None:
    denoiser: Any = build_denoiser("flux2", num_layers=1, num_single_layers=1).double()
    family = family_of(denoiser)
    inputs = family.example(denoiser, batch=2, size=(12, 16), text_tokens=7, pixels=(24, 32))
    names = block_modules(family.linears(denoiser))
    assert names == ("transformer_blocks.0", "single_transformer_blocks.0")
    with pausing.gated([denoiser.get_submodule(name) for name in names]):
        waiting = PausedPass(denoiser, ((), {**family.arguments(inputs), "return_dict": False}))
        for index, name in enumerate(names):
            writers = [each for each in family.linears(denoiser) if each.block == index and each.writes is not None]
            block = denoiser.get_submodule(name)
            look, result = glances.glance(block, name, writers, waiting.arguments, want="result", streams=True)
            after = [look.bases[each.name] + look.gates[each.name] * look.outputs[each.name] for each in writers]
            streams = (*reversed(result),) if isinstance(result, tuple) else (result,)
            for found, expected in zip(
                after, [*(look.bases[each.name] for each in writers[2:]), *streams], strict=True
            ):
                torch.testing.assert_close(found, expected)
            waiting.resume(result)


@torch.no_grad()
@pytest.mark.parametrize("pictures", [False, True], ids=["none", "pictures with gates of their own"])
def test_a_qwen_image_block_adds_gate_times_output_to_each_stream(
    pictures: bool, build_denoiser: Callable[..., nn.Module]
) -> None:
    denoiser: Any = build_denoiser("qwen", num_layers=2, zero_cond_t=pictures).double()
    family = family_of(denoiser)
    inputs = family.example(denoiser, batch=2, size=(12, 16), text_tokens=7, pixels=(24, 32))
    if pictures:
        inputs |= references.example(denoiser, "QwenImageEditPlusPipeline", batch=2, tokens=12)
    name = "transformer_blocks.0"
    writers = [each for each in family.linears(denoiser) if each.block == 0 and each.writes is not None]
    with pausing.gated([denoiser.get_submodule(name)]):
        waiting = PausedPass(denoiser, ((), {**family.arguments(inputs), "return_dict": False}))
        block = denoiser.get_submodule(name)
        look, (text, image) = glances.glance(block, name, writers, waiting.arguments, want="result", streams=True)
    heads, heads_text, neurons, neurons_text = [each.name for each in writers]
    after = {each: look.bases[each] + look.gates[each] * look.outputs[each] for each in look.bases}
    torch.testing.assert_close(after[heads], look.bases[neurons])
    torch.testing.assert_close(after[heads_text], look.bases[neurons_text])
    torch.testing.assert_close(after[neurons], image)
    torch.testing.assert_close(after[neurons_text], text)


@torch.no_grad()
def test_a_wan_block_adds_gate_times_output_to_its_stream(build_denoiser: Callable[..., nn.Module]) -> None:
    denoiser: Any = build_denoiser("wan")  # which reads its stream as float32, whatever its weights are
    family = family_of(denoiser)
    inputs = family.example(denoiser, batch=2, size=(4, 8), text_tokens=7, pixels=(24, 32))
    writers = [each for each in family.linears(denoiser) if each.block == 0 and each.writes is not None]
    with pausing.gated([denoiser.get_submodule("blocks.0")]):
        waiting = PausedPass(denoiser, ((), {**family.arguments(inputs), "return_dict": False}))
        block = denoiser.get_submodule("blocks.0")
        look, result = glances.glance(block, "blocks.0", writers, waiting.arguments, want="result", streams=True)
    after = [look.bases[each.name] + look.gates.get(each.name, 1.0) * look.outputs[each.name] for each in writers]
    before = [look.bases[each.name] for each in writers]
    for found, expected in zip(after, [*before[1:], result], strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_rows_that_guidance_does_not_pair_are_not_combined() -> None:
    guidance = Guidance(3.0)
    x, y = noise(2, 5, IN, seed=0), noise(2, 5, OUT, seed=1)
    grams = []
    for combine, paired in ((guidance, False), (None, True), (guidance, True)):
        sums = TierMoments([spec("q")], torch.device("cpu"), combine, 0.3)
        sums.add(seen({}, {"q": y}), seen({"q": x}, {}), 1.0, paired=paired)
        grams.append(sums.finish(0.0)[0]["x"].matrix)
    assert torch.equal(grams[0], grams[1])
    assert not torch.equal(grams[0], grams[2])


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.3, 2.0])
def test_the_guided_combination_counts_as_if_it_were_a_third_row(share: float) -> None:
    """Oracle: the three of them one by one."""
    guidance, linear = Guidance(3.5), spec("out")
    x, y, gate = noise(2 * ROWS, 5, IN, seed=0) + 1, noise(2 * ROWS, 5, OUT, seed=1), noise(ROWS, 1, OUT, seed=2)
    before = [noise(*y.shape, seed=seed) for seed in (3, 4)]
    found, expected = TierMoments([linear], x.device, guidance, share), TierMoments([linear], x.device)

    def count(sums: TierMoments, mix: Callable[[Tensor], Tensor], gate: Tensor, weight: float) -> None:
        dense = seen({}, {"out": mix(y)}, {"out": mix(before[0])}, {"out": gate})
        sums.add(dense, seen({"out": mix(x)}, {}, {"out": mix(before[1])}), weight)

    count(found, lambda value: value, gate.repeat(2, 1, 1), 2.0)
    count(expected, lambda value: value, gate.repeat(2, 1, 1), 2.0)
    count(expected, guidance.combined, gate, 2.0 * share)
    (gram, target), (gram_of_three, target_of_three) = (
        (grams["x"], targets["out"]) for grams, targets in (sums.finish(0.7) for sums in (found, expected))
    )
    torch.testing.assert_close(gram.matrix, gram_of_three.matrix, **CLOSE)
    torch.testing.assert_close(gram.mean, gram_of_three.mean, **CLOSE)
    torch.testing.assert_close(target.cross, target_of_three.cross, **CLOSE)
    torch.testing.assert_close(target.mean, target_of_three.mean, **CLOSE)
    torch.testing.assert_close(target.energy, target_of_three.energy, **CLOSE)


@torch.no_grad()
def test_a_layer_that_is_not_reached_is_named() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(IN, OUT), nn.Linear(IN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    linears = [spec("block.used"), spec("block.unused")]
    with pytest.raises(CalibrationError, match=r"block\.unused: no token reached this layer.*--exclude"):
        glances.glance(Bypass(), "block", linears, ((torch.ones(1, 2, IN),), {}), want="outputs", streams=False)


@torch.no_grad()
def test_a_glance_runs_no_further_than_it_must() -> None:
    block = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, OUT))
    ran = []
    block[1].register_forward_hook(lambda *_: ran.append(1))
    glances.glance(block, "block", [spec("block.0")], ((torch.ones(1, 2, IN),), {}), want="outputs", streams=False)
    assert not ran
    assert not block[0]._forward_hooks


@torch.no_grad()
def test_a_linear_that_is_its_own_block_is_seen() -> None:
    block, x = nn.Linear(IN, OUT), noise(ROWS, 5, IN, seed=0)
    look, _ = glances.glance(block, "proj_out", [spec("proj_out")], ((x,), {}), want="outputs", streams=False)
    assert torch.equal(look.outputs["proj_out"], block(x))
