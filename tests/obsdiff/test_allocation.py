"""Measured allocation: the measuring against plain forward passes, and what a spent budget must hold."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from obsdiff import allocation, costs, gradients, pruning, sensitivities, streaming, trajectories, unit_costs
from obsdiff.assignments import Assignment
from obsdiff.core.units import Removal
from obsdiff.groups import Consumer, Group
from obsdiff.job import computable, given
from obsdiff.methods import Layer, Options, Pruned
from obsdiff.methods.table import METHODS
from obsdiff.recipe import Recipe
from obsdiff.resolving import resolve
from obsdiff.results import PackageResult
from obsdiff.sensitivities import Candidate
from obsdiff.settings import Settings
from obsdiff.sparsity import Unstructured
from obsdiff.trajectories import Call, Guidance
from obsdiff_runtime.errors import CalibrationError, ConfigError
from obsdiff_runtime.progress import silent

KINDS = ["sd3", "sd15", "flux", "pixart", "sana"]
PROMPTS = ["a red circle", "a blue square", "a dog"]
ALIGNED: dict[str, Any] = {"align": 8}


def recipe_for(pipeline: DiffusionPipeline, sparsity: str, **settings: Any) -> Recipe:
    loaded = given(pipeline)
    tokens = {} if loaded.defaults.max_sequence_length is None else {"max_sequence_length": 2}
    asked: dict[str, Any] = {"sparsity": sparsity, "steps": 4, "height": 32, "width": 32, "batch_size": 2, "draws": 1}
    return resolve(
        Settings(**(asked | tokens | settings)),
        model="tiny",
        family=loaded.family,
        defaults=loaded.defaults,
        prompts=PROMPTS,
    )


class Subject:
    """A tiny pipeline, what is asked of it, and the calls of its dense model."""

    def __init__(self, pipeline: DiffusionPipeline, sparsity: str, **settings: Any) -> None:
        self.pipeline, loaded = pipeline, given(pipeline)
        computable(loaded)
        self.family, self.denoiser = loaded.family, loaded.denoiser
        self.recipe = recipe_for(pipeline, sparsity, **settings)

    def calls(self) -> list[Call]:
        return streaming.record(self.pipeline, self.family, self.recipe, silent)

    def measured(self, journal: Any = None) -> Assignment:
        calls, linears = self.calls(), self.family.linears(self.denoiser)
        metrics = gradients.measure(self.denoiser, linears, calls, weights=trajectories.weights(calls, self.recipe))
        return allocation.measured(
            self.denoiser,
            self.family,
            self.recipe,
            METHODS[self.recipe.method],
            Options(),
            calls,
            metrics,
            journal=journal,
            progress=silent,
        )

    def prune(self, journal: Any = None) -> pruning.Pruned:
        return pruning.prune(self.pipeline, self.family, self.recipe, journal=journal)


@pytest.fixture
def subject(build_pipeline: Callable[..., DiffusionPipeline]) -> Callable[..., Subject]:
    return lambda kind, sparsity, **settings: Subject(build_pipeline(kind), sparsity, **settings)


class Memory:
    """A journal in memory."""

    def __init__(self) -> None:
        self.packages: dict[str, PackageResult] = {}

    def read(self, package: str) -> PackageResult | None:
        return self.packages.get(package)

    def write(self, package: str, result: PackageResult) -> None:
        self.packages[package] = result


class Zeroing:
    """A method that sets the first units to zero, the first half of the weights, or a weight to NaN."""

    name, calibrates, removes_units, streams, time_weights = "zeroing", True, True, True, "uniform"

    def __init__(self, value: float = 0.0) -> None:
        self._value = value

    def prune_units(
        self, layers: Sequence[Layer], removals: Sequence[Removal], options: Options
    ) -> tuple[list[Tensor], list[Pruned]]:
        (removal,) = removals
        pruned = [
            self._pruned(layer, start or 0, removal.number * removal.width)
            for layer, start in zip(layers, removal.starts, strict=True)
        ]
        return [torch.arange(1)], pruned

    def prune_weights(self, layers: Sequence[Layer], pattern: Any, options: Options) -> list[Pruned]:
        return [self._pruned(layer, 0, layer.weight.shape[1] // 2) for layer in layers]

    def _pruned(self, layer: Layer, start: int, columns: int) -> Pruned:
        weight = layer.weight.clone()
        weight[:, start : start + columns] = self._value
        return Pruned(weight=weight, keep=weight != 0, loss=0.0)


def candidates(subject: Subject) -> list[Candidate]:
    groups = [group for group in subject.family.groups(subject.denoiser) if group.units > 1]
    units = [
        Candidate(key=group.name, block=group.block, linears=group.readers, group=group, removed=group.units // 2)
        for group in groups
    ]
    linear = subject.family.linears(subject.denoiser)[0]
    return [
        *units,
        Candidate(key="pattern", block=linear.block, linears=(linear.name,), pattern=Unstructured(ratio=0.0)),
    ]


def velocity(denoiser: nn.Module, call: Call) -> Tensor:
    args, kwargs = call.arguments
    with torch.no_grad():
        output: Any = denoiser(*args, **kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return (found[:, :4] if found.ndim == 4 else found).double()  # PixArt gives a variance behind the noise


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_s_error_is_that_of_a_plain_forward_pass(
    kind: str, scale: float | None, subject: Callable[..., Subject]
) -> None:
    """Under guidance that of what the sampler makes of two rows, which FLUX has not."""
    what = subject(kind, "structured:0.5")
    before = copy.deepcopy(what.denoiser)
    calls = what.calls()
    asked = candidates(what)
    errors = sensitivities.measure(
        what.denoiser, what.family.linears(before), asked, Zeroing(), Options(), calls, {},
        weights=[1.0] * len(calls), probes=2, guidance=None if scale is None else Guidance(scale),
    )  # fmt: skip
    assert errors.keys() == {candidate.key for candidate in asked}
    for candidate in asked:
        changed = copy.deepcopy(before)
        for name in candidate.linears:
            weight: Any = changed.get_submodule(name).weight
            group = candidate.group
            start = 0 if group is None else group.start(name)
            width = weight.shape[1] // 2 if group is None else group.width * candidate.removed
            weight.data[:, start : start + width] = 0
        found = []
        for index in sensitivities.spaced(calls, 2, sensitivities.EARLY):
            dense, pruned = (velocity(model, calls[index]).flatten(1) for model in (before, changed))
            if scale is not None and kind != "flux":
                dense, pruned = (torch.lerp(*each.chunk(2), scale) for each in (dense, pruned))
            found.append(((pruned - dense).square().sum(1) / dense.square().sum(1)).mean())
        # the same float32 operations in the same order
        assert errors[candidate.key] == pytest.approx(float(sum(found) / len(found)), rel=1e-6)
    assert all(torch.equal(old, new) for old, new in zip(before.parameters(), what.denoiser.parameters(), strict=True))


def test_a_candidate_that_breaks_the_model_is_named_and_leaves_it_whole(subject: Callable[..., Subject]) -> None:
    what = subject("sd3", "structured:0.5")
    before = copy.deepcopy(what.denoiser.state_dict())
    calls = what.calls()
    first = candidates(what)[:1]
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.0\.attn\.heads: .* not finite"):
        sensitivities.measure(
            what.denoiser, what.family.linears(what.denoiser), first, Zeroing(float("nan")), Options(), calls, {},
            weights=[1.0] * len(calls), probes=1,
        )  # fmt: skip
    assert all(torch.equal(before[name], tensor) for name, tensor in what.denoiser.state_dict().items())


def test_probes_are_spread_over_the_steps() -> None:
    calls = [Call(step=step, arguments=((), {}), prompts="") for step in (5, 3, 1, 7, 0, 2, 4, 6)]
    assert [calls[index].step for index in sensitivities.spaced(calls, 2)] == [2, 6]
    assert [calls[index].step for index in sensitivities.spaced(calls, 2, sensitivities.EARLY)] == [1, 5]
    assert sorted(calls[index].step for index in sensitivities.spaced(calls, 99)) == list(range(8))


@pytest.mark.parametrize(
    "sparsity", ["structured:0.25", "structured:0.5", "heads:0.5", "ffn:0.4", "structured:0.5+2:4"]
)
@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_as_many_macs_go_as_by_the_uniform_rule_in_whole_heads_and_multiples(
    kind: str, sparsity: str, subject: Callable[..., Subject]
) -> None:
    what = subject(kind, sparsity, **ALIGNED)
    paper = allocation.uniform(what.denoiser, what.family, what.recipe)
    found = what.measured()
    positions = allocation.positions(what.denoiser, what.calls()[0])
    saved, wanted = (
        unit_costs.saved_macs(what.denoiser, each.groups, each.removals, positions) for each in (found, paper)
    )
    assert saved >= wanted > 0
    groups = {group.name: group for group in found.groups}
    for name, removed in found.removals.items():
        assert 0 < removed < groups[name].units
        assert groups[name].kind == "heads" or (groups[name].units - removed) % 8 == 0
        assert getattr(what.recipe.sparsity, groups[name].kind) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_macs_counted_are_those_that_the_cut_model_saves(kind: str, subject: Callable[..., Subject]) -> None:
    what = subject(kind, "structured:0.5", **ALIGNED)
    call = what.calls()[0]
    before = costs.macs(what.denoiser, allocation.positions(what.denoiser, call))
    found, positions = what.measured(), allocation.positions(what.denoiser, call)
    saved = unit_costs.saved_macs(what.denoiser, found.groups, found.removals, positions)
    pruned = what.prune()
    assert pruned.units.keys() == found.removals.keys()
    assert before - costs.macs(pruned.denoiser, allocation.positions(pruned.denoiser, call)) == saved


def test_what_the_output_does_not_feel_goes_first(build_pipeline: Callable[..., DiffusionPipeline]) -> None:
    pipeline = build_pipeline("sd3")
    silent_one: Any = pipeline.transformer.transformer_blocks[1].ff.net[2]
    silent_one.weight.data.mul_(1e-4)
    what = Subject(pipeline, "ffn:0.25", **ALIGNED)
    found = what.measured()
    name = "transformer_blocks.1.ff.neurons"
    assert found.removals[name] == max(found.removals.values())
    assert min(found.sensitivities, key=lambda each: each.error).name == name


def test_protection_holds_where_it_is_asked_for_and_only_there(subject: Callable[..., Subject]) -> None:
    def blocks(**settings: Any) -> set[int]:
        found = subject("sd3", "structured:0.5", **ALIGNED, **settings).measured()
        return {group.block for group in found.groups}

    assert blocks(protect_first=1, protect_last=1) == {1}
    assert blocks(protect_last=1) == {0, 1}
    assert blocks() == {0, 1, 2}


def test_readers_of_a_tensor_stay_dense_together_within_the_share(subject: Callable[..., Subject]) -> None:
    what = subject("sd3", "2:4", dense_share=0.25)
    found = what.measured()
    linears = what.family.linears(what.denoiser)
    dense = {name for name, reason in found.dense.items() if "costs most" in reason}
    together: dict[tuple[int, str], set[str]] = {}
    for linear in linears:
        together.setdefault((linear.block, linear.reads), set()).add(linear.name)
    assert dense
    assert dense.isdisjoint(found.patterns)
    assert all(names <= dense or names.isdisjoint(dense) for names in together.values())
    macs = unit_costs.left_macs(linears, (), {}, allocation.positions(what.denoiser, what.calls()[0]))
    assert 0 < sum(macs[name] for name in dense) <= 0.25 * sum(macs.values())
    pruned = what.prune()
    assert {layer.name for layer in pruned.layers if "costs most" in (layer.reason or "")} == dense


def test_single_weights_go_where_they_cost_least_and_as_many_as_asked(subject: Callable[..., Subject]) -> None:
    what = subject("sd3", "0.5")
    linears = {linear.name: linear for linear in what.family.linears(what.denoiser)}
    sizes = {name: linear.in_features * linear.out_features for name, linear in linears.items()}
    found = what.measured()
    ratios = {name: pattern.ratio for name, pattern in found.patterns.items()}
    costs = {each.name: each.error / sum(sizes[name] for name in each.name.split()) for each in found.sensitivities}
    dearest, cheapest = (ratios[pick(costs, key=costs.__getitem__).split()[0]] for pick in (max, min))
    assert dearest < 0.5 < cheapest
    assert all(abs(ratio - 0.5) <= allocation.REACH for ratio in ratios.values())
    together = {(linear.block, linear.reads): ratios[name] for name, linear in linears.items()}
    assert all(together[linear.block, linear.reads] == ratios[name] for name, linear in linears.items())
    pruned = what.prune()
    zeros = sum(layer.zeros * sizes[layer.name] for layer in pruned.layers if layer.name in ratios)
    assert 0.5 <= round(zeros / sum(sizes.values()), 3) <= 0.51


@pytest.mark.parametrize(
    ("ratio", "least", "most"), [(0.5, 0.25, 0.75), (0.2, 0.01, 0.45), (0.8, 0.55, 0.95), (0.97, 0.72, 0.97)]
)
def test_the_ratios_near_one_stay_shares_and_hold_it(ratio: float, least: float, most: float) -> None:
    near = allocation.ratios_near(ratio)
    assert (near[0], near[-1]) == (least, most)
    assert ratio in near


def test_a_run_that_goes_on_keeps_to_what_it_measured(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Memory()
    first = subject("sd3", "structured:0.5", **ALIGNED).prune(journal)
    left = Memory()
    left.packages = {"allocation": journal.packages["allocation"]}

    def refuse(*_: Any, **__: Any) -> Mapping[str, float]:
        raise RuntimeError("measured again")

    monkeypatch.setattr(sensitivities, "measure", refuse)
    second = subject("sd3", "structured:0.5", **ALIGNED).prune(left)
    assert second.kept == first.kept
    assert second.sensitivities == first.sensitivities
    after = second.denoiser.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in first.denoiser.state_dict().items())


def test_the_record_holds_what_was_measured(subject: Callable[..., Subject]) -> None:
    pruned = subject("sd15", "structured:0.5", **ALIGNED).prune()
    rows = pruned.to_json()["sensitivities"]
    assert rows == [dataclasses.asdict(each) for each in pruned.sensitivities]
    assert {row["name"] for row in rows} >= pruned.kept.keys()
    assert all(row["macs"] > 0 and row["error"] >= 0 and 0 < row["ratio"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("units", "align", "expected"),
    [(16, 4, [0, 4, 8, 12]), (16, 16, [0]), (16, 64, [0]), (10, 4, [0, 2, 6]), (300, 1, [0, *range(5, 300, 5), 299])],
)
def test_widths_are_multiples_and_not_too_many(units: int, align: int, expected: list[int]) -> None:
    group = Group(name="g", kind="ffn", block=0, units=units, width=1, producers=(), consumers=(Consumer(name="c"),))
    assert allocation.removable(group, align) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "structured:0.25", "method": "obsdiff", "allocation": "measured"}, "same share everywhere"),
        ({"sparsity": "2:4", "allocation": "measured"}, "leaves nothing to choose"),
        ({"sparsity": "2:4", "dense_share": 0.25, "allocation": "uniform"}, "is measured"),
        ({"sparsity": "2:4", "dense_share": 0.25, "method": "obsdiff"}, "is measured"),
        ({"sparsity": "2:4", "dense_share": 1.0}, r"in \[0, 1\)"),
        ({"sparsity": "2:4", "dense_share": -0.1}, r"in \[0, 1\)"),
        ({"sparsity": "structured:0.25", "dense_share": 0.25}, "has no pattern"),
        ({"sparsity": "structured:0.25", "allocation": "mesured"}, "did you mean measured"),
    ],
)
def test_an_allocation_that_cannot_be_is_refused(
    settings: dict[str, Any], message: str, build_pipeline: Callable[..., DiffusionPipeline]
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for(build_pipeline("sd15"), **settings)


@pytest.mark.parametrize(
    ("sparsity", "method", "expected"),
    [
        ("structured:0.25", "streamed", "measured"),
        ("structured:0.2+2:4", "streamed", "measured"),
        ("2:4", "streamed", "uniform"),
        ("structured:0.25", "obsdiff", "uniform"),
    ],
)
def test_units_are_allocated_by_measurement_where_the_method_streams(
    sparsity: str, method: str, expected: str, build_pipeline: Callable[..., DiffusionPipeline]
) -> None:
    assert recipe_for(build_pipeline("sd15"), sparsity, method=method).allocation == expected
