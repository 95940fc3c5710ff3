"""Allocation by time: the costs against multiply-accumulates, and what a table must hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from hypothesis import example
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from obsdiff import allocation, latencies, pruning, streaming
from obsdiff.core import budget
from obsdiff.groups import Group
from obsdiff.job import computable, given
from obsdiff.loading import load_pipeline
from obsdiff.methods import Options
from obsdiff.methods.table import METHODS
from obsdiff.recipe import Recipe
from obsdiff.resolving import resolve
from obsdiff.results import PackageResult
from obsdiff.settings import Settings
from obsdiff_export.latency_table import Entry, LatencyTable
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.progress import silent

Time = Callable[[int, int, int], float]
ROWS = 2


def by_macs(m: int, k: int, n: int) -> float:
    """Weights and biases, as costs.py counts them, times an odd number."""
    return 3.7e-9 * m * (k + 1) * n


class Memory:
    """A journal in memory: errors do not depend on what is spent."""

    def __init__(self) -> None:
        self.packages: dict[str, PackageResult] = {}

    def read(self, package: str) -> PackageResult | None:
        return self.packages.get(package)

    def write(self, package: str, result: PackageResult) -> None:
        self.packages[package] = result


class Subject:
    """A tiny pipeline and the calls of its dense model; tables are written for the widths that allocation considers."""

    def __init__(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        self.loaded, self.folder = given(pipeline), folder
        computable(self.loaded)
        self.journals: dict[tuple[str, int], Memory] = {}
        self.family, self.denoiser = self.loaded.family, self.loaded.denoiser
        self.calls = streaming.record(pipeline, self.family, self.recipe("measured"), silent)
        self.positions = allocation.positions(self.denoiser, self.calls[0])
        self.linears = {linear.name: linear for linear in self.family.linears(self.denoiser)}

    def recipe(self, allocation: str, sparsity: str = "structured:0.5", **settings: Any) -> Recipe:
        asked: dict[str, Any] = {"steps": 4, "height": 32, "width": 32, "batch_size": 2, "draws": 1, "align": 8}
        asked |= {"max_sequence_length": 2, "sparsity": sparsity, "allocation": allocation}
        return resolve(
            Settings(**(asked | settings)),
            model="tiny",
            family=self.loaded.family,
            defaults=self.loaded.defaults,
            prompts=["a red circle", "a blue square"],
        )

    def removals(self, recipe: Recipe) -> dict[str, int]:
        found = allocation.measured(
            self.denoiser,
            self.family,
            recipe,
            METHODS[recipe.method],
            Options(),
            self.calls,
            {},
            journal=self.journals.setdefault((str(recipe.sparsity), recipe.align), Memory()),
            progress=silent,
        )
        return dict(found.removals)

    def table(self, time: Time, **changes: Any) -> Path:
        """Every product that allocation may look up."""
        shapes = {
            shape
            for group in self.family.groups(self.denoiser)
            for number in allocation.removable(group, 8)
            for shape in self.products(group, number)
        }
        entries = [
            Entry(m=m, k=k, n=n, dtype="float16", variant="dense", ms=ms, low_ms=ms, high_ms=ms, rounds=9)
            for m, k, n in sorted(shapes)
            for ms in [time(m, k, n)]
        ]
        call = {"height": 32, "width": 32, "rows": ROWS, "text_tokens": 14}
        given = {"what": "measured", "device": "a GPU", "backend": "fake", "date": "today", "model": "tiny"} | changes
        LatencyTable(call=call, entries=tuple(entries), **given).save(self.folder / "table.json")
        return self.folder / "table.json"

    def products(self, group: Group, removed: int) -> list[tuple[int, int, int]]:
        found = []
        lost = removed * group.width
        changes = [(each.name, 0, lost * each.parts) for each in group.producers]
        for name, columns, rows in [*changes, *((name, lost, 0) for name in group.readers)]:
            if name in self.linears:
                linear = self.linears[name]
                m = ROWS * self.positions[name]
                found.append((m, linear.in_features - columns, linear.out_features - rows))
        return found


@pytest.fixture(scope="module")
def subject(sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Nothing that is asked of it changes the model."""
    return Subject(load_pipeline(sd3_folder).pipeline, tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("sparsity", ["structured:0.25", "structured:0.5", "heads:0.5", "ffn:0.4"])
def test_a_table_that_goes_like_macs_gives_the_allocation_by_macs(subject: Subject, sparsity: str) -> None:
    path = subject.table(by_macs)
    expected = subject.removals(subject.recipe("measured", sparsity))
    assert expected
    assert subject.removals(subject.recipe(f"latency:{path}", sparsity)) == expected


@pytest.mark.parametrize("worthless", ["heads", "ffn"])
def test_cuts_move_to_where_they_save_time(subject: Subject, worthless: str) -> None:
    heads = subject.linears["transformer_blocks.0.attn.to_q"].in_features
    bound = min if worthless == "ffn" else max

    def time(m: int, k: int, n: int) -> float:
        return by_macs(m, bound(k, heads), bound(n, heads))

    # aligned to the heads' width, so that no feed-forward gets as narrow as they are: then its products would be theirs
    removed = subject.removals(subject.recipe(f"latency:{subject.table(time)}", align=heads))
    kinds = {group.name: group.kind for group in subject.family.groups(subject.denoiser)}
    assert {kinds[name] for name in removed} == {"heads" if worthless == "ffn" else "ffn"}


def test_as_much_time_goes_as_by_the_uniform_rule(subject: Subject) -> None:
    path = subject.table(lambda m, k, n: 0.02 + by_macs(m, k, n) ** 0.7)
    recipe = subject.recipe(f"latency:{path}")
    times = latencies.Times(latencies.table_of(recipe.allocation), tuple(subject.linears.values()), subject.positions)
    paper = allocation.uniform(subject.denoiser, subject.family, recipe)
    groups = subject.family.groups(subject.denoiser)
    found = times.saved_ms(groups, subject.removals(recipe))
    assert found >= times.saved_ms(paper.groups, paper.removals) * (1 - 1e-9) > 0  # 1e-9: of the whole units


def test_what_is_pruned_is_what_was_allocated(
    subject: Subject, build_pipeline: Callable[..., DiffusionPipeline]
) -> None:
    plain = {"method_options": {"metric": 0}}  # as the errors that `removals` measures
    recipe = subject.recipe(f"latency:{subject.table(by_macs)}", "ffn:0.4", **plain)
    expected = subject.removals(recipe)
    pruned = pruning.prune(build_pipeline("sd3"), subject.family, recipe)
    assert {name: pruned.units[name] - len(kept) for name, kept in pruned.kept.items()} == {
        name: number for name, number in expected.items() if number
    }


def test_a_shape_that_the_table_lacks_is_named(subject: Subject) -> None:
    path = subject.table(by_macs)
    m = ROWS * subject.positions["transformer_blocks.1.ff.net.2"]
    LatencyTable(**_without(path, m, 128, 32)).save(path)  # other blocks have the same shape
    with pytest.raises(ConfigError, match=rf"ff\.net\.2: the latency table has no linear of {m} x 128 x 32 .*whatif"):
        subject.removals(subject.recipe(f"latency:{path}"))


def test_a_table_without_narrower_widths_is_refused(subject: Subject) -> None:
    path = subject.table(by_macs)
    data = json.loads(path.read_text())
    data["entries"] = [entry for entry in data["entries"] if {entry["k"], entry["n"]} <= {32, 128}]
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"at no smaller number of (in|out)puts"):
        subject.removals(subject.recipe(f"latency:{path}"))


def test_cuts_that_save_no_time_are_refused(subject: Subject) -> None:
    path = subject.table(lambda m, k, n: 1.0)
    with pytest.raises(ConfigError, match="the cuts asked for save no time"):
        subject.removals(subject.recipe(f"latency:{path}"))


def test_a_table_that_changed_since_is_refused(subject: Subject) -> None:
    recipe = subject.recipe(f"latency:{subject.table(by_macs)}")
    subject.table(by_macs, device="another GPU")
    with pytest.raises(ConfigError, match="has changed since the recipe named it"):
        subject.removals(recipe)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"what": "estimate"}, {}, "is an estimate from published peaks .* measure it there"),
        ({"schema": 9}, {}, "of schema 9, this obsdiff reads 1"),
        ({"kind": "shopping list"}, {}, "is no latency table; obsdiff whatif MODEL -o"),
        ({"entries": ()}, {}, "the table is empty"),
        ({}, {"method": "obsdiff"}, "takes the same share everywhere"),
        ({}, {"sparsity": "2:4"}, "removes no units"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_before_any_work(
    subject: Subject, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    path = subject.table(by_macs)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        subject.recipe(f"latency:{path}", **({"sparsity": "structured:0.5"} | settings))


def test_a_file_that_is_not_there_is_named(subject: Subject) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        subject.recipe("latency:none.json")


@hypothesis_given(st.lists(st.integers(-3, 40_000), min_size=1, max_size=40), st.floats(1e-6, 1e3))
def test_multiples_of_any_unit_are_found_again(numbers: list[int], unit: float) -> None:
    found = budget.whole([number * unit for number in numbers])
    positive = [max(number, 0) for number in numbers]
    largest = max(range(len(numbers)), key=lambda index: positive[index])
    if positive[largest]:
        assert [value * positive[largest] for value in found] == [value * found[largest] for value in positive]


@hypothesis_given(st.lists(st.floats(0, 1e3), min_size=2, max_size=20))
@example(values=[0.0, 2.225073858507203e-309])
def test_other_savings_keep_their_proportions(values: list[float]) -> None:
    found = budget.whole(values)
    if max(values) > 0:
        expected = [value / max(values) * max(found) for value in values]  # max / max would overflow at denormals
        assert found == pytest.approx(expected, abs=max(found) * 1e-5 + 1)


def _without(path: Path, m: int, k: int, n: int) -> dict[str, Any]:
    data = json.loads(path.read_text())
    entries = [Entry(**entry) for entry in data.pop("entries")]
    return data | {"entries": tuple(e for e in entries if (e.m, e.k, e.n) != (m, k, n))}
