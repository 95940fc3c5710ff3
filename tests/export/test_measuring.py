"""Timing of single linears, on a clock that products move, and 2:4 in torch with kernels that are none."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from obsdiff_export import measuring, semi_structured
from obsdiff_export.asking import Outcome
from obsdiff_export.linears import Shape
from obsdiff_export.measuring import OnnxRuntimeCpu, Product, TensorRtLinear, Variant, measure
from obsdiff_export.pattern import check
from obsdiff_runtime import timing
from obsdiff_runtime.errors import CompatibilityError, ConfigError, RunError

FULL, HALF = Shape(8, 16, 16), Shape(8, 16, 8)


class Clock:
    """Time that passes only when something is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    monkeypatch.setattr(measuring, "perf_counter", found.perf_counter)
    return found


class Fake:
    """Products that take as long as they are told, twice as long as calls."""

    backend, dtype = "fake", "float16"

    def __init__(self, clock: Clock, seconds: Mapping[tuple[Shape, str], float], calls: int = 1) -> None:
        self._clock, self._seconds, self._calls, self.open = clock, seconds, calls, 0

    def device(self) -> str:
        return "a GPU"

    def versions(self) -> dict[str, str]:
        return {}

    def without_sparse(self) -> str:
        return ""

    @contextmanager
    def prepare(self, shape: Shape, variant: Variant) -> Iterator[Product]:
        if (shape, variant) not in self._seconds:
            raise CompatibilityError("no kernel for it")
        self.open += 1

        def run() -> None:
            self._clock.now += self._seconds[shape, variant]

        try:
            yield Product(run=run, calls=self._calls)
        finally:
            self.open -= 1


def test_a_time_is_that_of_one_product_and_is_compared_with_the_first(clock: Clock) -> None:
    fake = Fake(clock, {(FULL, "dense"): 0.4, (FULL, "2:4"): 0.2, (HALF, "dense"): 0.3}, calls=100)
    found = measure(fake, [(FULL, "dense"), (FULL, "2:4"), (HALF, "dense")], seconds=60)
    assert [entry.ms for entry in found.entries] == pytest.approx([4.0, 2.0, 3.0])
    assert {key: each.speedup for key, each in found.comparisons.items()} == pytest.approx(
        {(FULL, "2:4"): 2.0, (HALF, "dense"): 4 / 3}
    )
    assert found.failures == {}
    assert fake.open == 0


def test_what_does_not_fit_into_the_time_is_said(clock: Clock) -> None:
    fake = Fake(clock, {(FULL, "dense"): 0.4, (FULL, "2:4"): 5.0, (HALF, "dense"): 0.3})
    found = measure(fake, [(FULL, "dense"), (FULL, "2:4"), (HALF, "dense")], seconds=24)
    assert [(entry.n, entry.variant) for entry in found.entries] == [(16, "dense"), (8, "dense")]
    assert found.failures.keys() == {(FULL, "2:4")}
    assert "--minutes" in found.failures[FULL, "2:4"]
    assert clock.now < 24 * 1.1


def test_nothing_is_made_once_the_time_is_up(clock: Clock) -> None:
    """An engine takes longer to build than to time."""
    made: list[str] = []

    class Slow(Fake):
        @contextmanager
        def prepare(self, shape: Shape, variant: Variant) -> Iterator[Product]:
            made.append(variant)
            self._clock.now += 20
            with super().prepare(shape, variant) as product:
                yield product

    slow = Slow(clock, {(FULL, "dense"): 0.01, (FULL, "2:4"): 0.01, (HALF, "dense"): 0.01})
    found = measure(slow, [(FULL, "dense"), (FULL, "2:4"), (HALF, "dense")], seconds=30)
    assert made == ["dense", "2:4"]
    assert [entry.variant for entry in found.entries] == ["dense"]
    assert found.failures.keys() == {(FULL, "2:4"), (HALF, "dense")}


def test_a_product_that_cannot_be_made_leaves_the_others(clock: Clock) -> None:
    found = measure(Fake(clock, {(FULL, "dense"): 0.01}), [(FULL, "dense"), (FULL, "2:4")], seconds=9)
    assert len(found.entries) == 1
    assert found.failures == {(FULL, "2:4"): "no kernel for it"}
    assert measure(Fake(clock, {}), [(FULL, "dense")], seconds=9).entries == ()


@pytest.mark.parametrize(
    ("gain", "spread", "faster", "no_faster"),
    [(1.5, 0.0, True, False), (1.02, 0.0, False, True), (1.0, 0.0, False, True), (1.04, 0.2, False, False)],
)
def test_a_gain_must_be_sure_and_more_than_builds_differ_by(
    gain: float, spread: float, faster: bool, no_faster: bool
) -> None:
    rng = np.random.default_rng(0)
    base = list(gain * (1 + spread * rng.standard_normal(30)))
    found = timing.compare("2:4", [1.0] * 30, "dense", base)
    assert (measuring.is_faster(found), measuring.is_no_faster(found)) == (faster, no_faster)


def test_onnx_runtime_times_dense_and_narrower() -> None:
    measurer = OnnxRuntimeCpu(1)
    found = measure(measurer, [(Shape(4, 64, 64), "dense"), (Shape(4, 64, 32), "dense")], seconds=60)
    assert [(entry.n, entry.dtype) for entry in found.entries] == [(64, "float32"), (32, "float32")]
    assert all(0 < entry.low_ms <= entry.ms <= entry.high_ms for entry in found.entries)
    assert "no sparse kernels" in measurer.without_sparse()


def test_engines_with_and_without_the_flag_hold_the_same_weights(tmp_path: Path) -> None:
    built: list[tuple[bytes, bool]] = []

    @contextmanager
    def engine(graph: Path, folder: Path, sparse: bool) -> Iterator[Callable[[], object]]:
        built.append((onnx.load(graph).SerializeToString(), sparse))
        assert check(graph, 2, 4, ["linear"])
        yield lambda: None

    measurer = TensorRtLinear(engine, tmp_path, device="a GPU", versions={"tensorrt": "11"}, dtype="float16")
    for variant in ("dense", "2:4"):
        with measurer.prepare(FULL, variant):  # type: ignore[arg-type]
            pass
    assert [sparse for _, sparse in built] == [False, True]
    assert built[0][0] == built[1][0]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)).to(torch.bfloat16)
    for index in (0, 1):
        groups = net[index].weight.data.view(-1, 4)  # type: ignore[union-attr]
        groups[:, 1:3] = 0
    return net


def racing(ratios: Mapping[int, float]) -> Callable[..., dict[str, list[float]]]:
    """Stands for the clock: 2:4 takes 1 / ratio of the time, by the width of the weight."""
    widths = iter(ratios.values())

    def interleaved(runs: Mapping[str, Any], rounds: int, *_: Any) -> dict[str, list[float]]:
        if list(runs) == ["once"]:
            return {"once": [1.0] * rounds}
        ratio = next(widths)
        return {"dense": [1.0] * rounds, "2:4": [1 / ratio] * rounds}

    return interleaved


def test_a_linear_is_replaced_only_where_that_was_faster(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "interleaved", racing({16: 1.4, 32: 1.01}))
    before = [linear.weight for linear in network]
    found = semi_structured.use_where_faster(
        network, {"0": 64, "1": 64, "2": 64}, compress=lambda weight, _: weight.clone()
    )
    assert [each.sparse for each in found] == [True, False, False]
    assert "not faster beyond noise" in found[1].reason
    assert found[2].reason == "its weight is not 2:4"
    assert [linear.weight is old for linear, old in zip(network, before, strict=True)] == [False, True, True]
    assert torch.equal(network[0].weight, before[0])


def test_linears_of_one_shape_are_timed_once(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = nn.Sequential(network[0], nn.Identity(), nn.Linear(16, 32).to(torch.bfloat16))
    twins[2].load_state_dict(network[0].state_dict())
    monkeypatch.setattr(semi_structured, "interleaved", racing({16: 1.4}))  # a second race would have no result
    found = semi_structured.use_where_faster(twins, {"0": 8, "2": 8}, compress=lambda weight, _: weight.clone())
    assert [each.sparse for each in found] == [True, True]


def test_kernels_that_compute_something_else_are_an_error(network: nn.Module) -> None:
    with pytest.raises(RunError, match=r"0: the sparse product differs from the dense one by"):
        semi_structured.use_where_faster(network, {"0": 8}, compress=lambda weight, _: weight * 1.1)
    with pytest.raises(RunError, match="differs"):
        semi_structured.use_where_faster(network, {"0": 8}, compress=lambda weight, _: weight * float("nan"))


def test_a_linear_without_a_kernel_stays_dense_and_says_why(network: nn.Module) -> None:
    found = semi_structured.use_where_faster(network, {"0": 8})  # torch's own, on the CPU
    assert not found[0].sparse
    assert "has no 2:4 kernel here for a weight of (32, 16)" in found[0].reason
    with pytest.raises(ConfigError, match="too few"):
        semi_structured.use_where_faster(network, {"0": 8}, rounds=3)


def test_an_example_weight_is_2_of_4_wherever_it_can_be() -> None:
    weight, x = semi_structured.example(Shape(3, 16, 8), torch.float16, torch.device("cpu"))
    assert semi_structured.is_2_of_4(weight)
    assert (weight.shape, x.shape) == ((8, 16), (3, 16))
    assert not semi_structured.is_2_of_4(semi_structured.example(Shape(3, 6, 8), torch.float16, torch.device("cpu"))[0])


def answering(seconds: Mapping[int, float], asked: list[str] | None = None) -> Callable[..., dict[str, Outcome]]:
    """Stands for the process that times algorithms: one of these seconds, 9 for others, and an end after the last."""

    def ask(place: str, questions: Sequence[str], **_: Any) -> dict[str, Outcome]:
        assert place == "obsdiff_export.probes.cusparselt:seconds"
        found = {}
        for question in questions:
            if asked is not None:
                asked.append(question)
            number = int(question.rpartition("/")[2])
            value = None if number > max(seconds) else seconds.get(number, 9.0)
            found[question] = Outcome(value=value, failure="" if value else "it crashed")
        return found

    return ask


def test_the_fastest_algorithm_is_taken_and_one_that_crashed_is_not_tried_again() -> None:
    asked: list[str] = []
    algorithms = semi_structured.Algorithms("float16", answering({0: 3.0, 1: 1.0, 2: 2.0, 5: 4.0}, asked))
    assert algorithms.best(FULL) == 1
    assert asked[0] == f"float16/{FULL.m}x{FULL.k}x{FULL.n}/0"
    assert len(asked) == semi_structured.MOST_ALGORITHMS
    assert algorithms.best(FULL) == 1
    assert len(asked) == semi_structured.MOST_ALGORITHMS, "what is known is not asked again"
    algorithms.find([HALF, Shape(8, 16, 96)])
    assert len(asked) - semi_structured.MOST_ALGORITHMS == 2 * 6, "six algorithms are known to be safe"


def test_without_any_answer_the_default_algorithm_is_taken() -> None:
    algorithms = semi_structured.Algorithms("float16", answering({-1: 1.0}))
    assert algorithms.best(FULL) == 0


def test_a_real_search_without_a_gpu_finds_nothing_and_does_not_fail() -> None:
    assert torch.cuda.is_available() or semi_structured.Algorithms("float16").best(Shape(8, 64, 64)) == 0


def test_torch_products_are_prepared_for_either_variant() -> None:
    used: list[tuple[Tensor, int]] = []

    def compress(weight: Tensor, algorithm: int) -> Tensor:
        used.append((weight, algorithm))
        return weight

    algorithms = semi_structured.Algorithms("bfloat16", answering({3: 1.0}))
    measurer = semi_structured.TorchCuda("bfloat16", "cpu", compress, algorithms)
    for variant in ("dense", "2:4"):
        with measurer.prepare(FULL, variant) as product:  # type: ignore[arg-type]
            product.run()
            assert product.calls >= 1
    assert [algorithm for _, algorithm in used] == [3]
    with pytest.raises(ConfigError, match="not in int8"):
        semi_structured.TorchCuda("int8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4096, 154])
def test_semi_structured_products_are_the_dense_ones(dtype: torch.dtype, tokens: int) -> None:
    weight, x = semi_structured.example(Shape(tokens, 1536, 6144), dtype, torch.device("cuda"))
    found = functional.linear(x, semi_structured.compress(weight))
    expected = functional.linear(x, weight)
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert float(difference) <= semi_structured.TOLERANCE[dtype]
