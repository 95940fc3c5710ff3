"""Times single linears on what is here. A measurer prepares products; all that are compared run interleaved.

product    one (m, k) x (k, n) with random weights, ready to run
run        what is timed: a product, made `calls` times
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final, Literal, Protocol

import numpy as np

from obsdiff_export.forcing import write_linear
from obsdiff_export.latency_table import SPARSE, Entry
from obsdiff_export.linears import Shape
from obsdiff_runtime.backends.ort import open_graph, versions
from obsdiff_runtime.errors import ConfigError, ObsdiffError
from obsdiff_runtime.progress import silent
from obsdiff_runtime.timing import LEAST, Comparison, compare, interleaved, machine

FEWEST: Final = 9
"""Rounds of a product, at least: the fewest from which an interval of the median can be given, with some to spare."""

MOST: Final = 60

LATE: Final = "the time was up; give it more --minutes"

Variant = Literal["dense", "2:4"]

Verdict = Literal["worth it", "not worth it", "within noise", "not measured"]
"""On 2:4. "worth it": timing is sure of a gain larger than what counts as noise between builds; "not worth it": it is
sure that there is none; "within noise": neither."""


def seconds_of(minutes: float) -> float:
    """A budget of time, as `--minutes` gives it.

    Raises:
        ConfigError: it is none.
    """
    if not 0 < minutes < 24 * 60:
        raise ConfigError(f"--minutes {minutes:g}: must be more than 0 and less than a day")
    return 60 * minutes


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product that is ready; `run` makes it `calls` times and returns when the last is done."""

    run: Callable[[], object]
    calls: int = 1


class Measurer(Protocol):
    """What can time a linear.

    Attributes:
        backend: for reports: "torch", "TensorRT", "ONNX Runtime".
        dtype: of activations and weights: "float16", ...
    """

    backend: str
    dtype: str

    def device(self) -> str:
        """The GPU's or CPU's name."""
        ...

    def versions(self) -> dict[str, str]:
        """Of what is timed."""
        ...

    def without_sparse(self) -> str:
        """Why 2:4 has no kernels here, "" where it has."""
        ...

    def prepare(self, shape: Shape, variant: Variant) -> AbstractContextManager[Product]:
        """A product, for as long as the context is open.

        Raises:
            ObsdiffError: it cannot be made; says why.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What was found out about products that were timed together.

    Attributes:
        entries: of those that ran.
        comparisons: of each later one with the first, by (shape, variant).
        failures: why a product did not run, by (shape, variant).
    """

    entries: tuple[Entry, ...]
    comparisons: Mapping[tuple[Shape, str], Comparison]
    failures: Mapping[tuple[Shape, str], str]


def measure(measurer: Measurer, products: Sequence[tuple[Shape, Variant]], *, seconds: float) -> Timed:
    """Times products by turns, within a budget.

    Args:
        measurer: that makes them.
        products: the first is what the others are compared with.
        seconds: to spend; products that would not get FEWEST rounds in it fail, the last ones first.
    """
    started = perf_counter()
    ready: dict[tuple[Shape, str], Product] = {}
    failures: dict[tuple[Shape, str], str] = {}
    with ExitStack() as opened:
        round_seconds = 0.0
        for shape, variant in products:
            if perf_counter() - started > seconds:  # making a product, an engine above all, takes time too
                failures[shape, variant] = LATE
                continue
            try:
                product = opened.enter_context(measurer.prepare(shape, variant))
                took = _once(product)
            except ObsdiffError as error:
                failures[shape, variant] = str(error)
                continue
            left = seconds - (perf_counter() - started)
            if (round_seconds + took) * FEWEST > left:
                failures[shape, variant] = LATE
                continue
            ready[shape, variant] = product
            round_seconds += took
        if not ready:
            return Timed(entries=(), comparisons={}, failures=failures)
        left = seconds - (perf_counter() - started)
        rounds = int(min(max(left / max(round_seconds, 1e-9), FEWEST), MOST))
        runs = {_name(key): product.run for key, product in ready.items()}
        found = interleaved(runs, rounds, 1, silent)
    times = {key: [value / product.calls for value in found[_name(key)]] for key, product in ready.items()}
    base = products[0]
    comparisons = {
        key: compare(_name(key), values, _name(base), times[base])
        for key, values in times.items()
        if key != base and base in times
    }
    entries = tuple(_entry(key[0], measurer.dtype, key[1], values) for key, values in times.items())
    return Timed(entries=entries, comparisons=comparisons, failures=failures)


def is_faster(comparison: Comparison) -> bool:
    """Whether the timing is sure of a gain, and it is more than counts as noise between builds."""
    return comparison.outcome == "faster"


def is_no_faster(comparison: Comparison) -> bool:
    """Whether the timing is sure that there is no gain which counts."""
    return comparison.high is not None and comparison.high < 1 + LEAST


def verdict(comparison: Comparison) -> Verdict:
    """On 2:4, from its comparison with the dense product."""
    if is_faster(comparison):
        return "worth it"
    return "not worth it" if is_no_faster(comparison) else "within noise"


class OnnxRuntimeCpu:
    """ONNX Runtime on the CPU: dense products of any width; it has no sparse kernels."""

    backend = "ONNX Runtime"
    dtype = "float32"

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads

    def device(self) -> str:
        return machine().cpu

    def versions(self) -> dict[str, str]:
        return versions()

    def without_sparse(self) -> str:
        return "ONNX Runtime has no sparse kernels on the CPU"

    @contextmanager
    def prepare(self, shape: Shape, variant: Variant) -> Iterator[Product]:
        with tempfile.TemporaryDirectory(prefix="obsdiff-") as scratch:
            path = write_linear(Path(scratch), shape, self.dtype, pattern=(2, 4) if variant == SPARSE else None)
            session = open_graph(path, name=str(shape), threads=self._threads)
            inputs = {"x": np.random.default_rng(1).standard_normal((shape.m, shape.k), dtype=np.float32)}
            yield Product(run=lambda: session.run(inputs))


RunEngine = Callable[[Path, Path, bool], AbstractContextManager[Callable[[], object]]]
"""(graph, folder for engines, whether sparse tactics are allowed) -> what runs the engine once and waits for its end,
for as long as the context is open; inputs and outputs stay on the GPU. Raises an ObsdiffError where it cannot."""


class TensorRtLinear:
    """TensorRT: one engine a product; 2:4 is the same forced weights built with sparse tactics allowed.

    A dense product whose k 2:4 fits has those weights too, without the flag, so that kernels alone differ.
    """

    backend = "TensorRT"

    def __init__(
        self, engine: RunEngine, folder: Path, *, device: str, versions: Mapping[str, str], dtype: str
    ) -> None:
        self.dtype = dtype
        self._engine, self._folder, self._device, self._versions = engine, folder, device, versions

    def device(self) -> str:
        return self._device

    def versions(self) -> dict[str, str]:
        return dict(self._versions)

    def without_sparse(self) -> str:
        return ""

    @contextmanager
    def prepare(self, shape: Shape, variant: Variant) -> Iterator[Product]:
        name = f"{shape.m}x{shape.k}x{shape.n}"
        graph = write_linear(self._folder / name, shape, self.dtype, pattern=None if shape.k % 4 else (2, 4))
        with self._engine(graph, self._folder / "engines" / name, variant == SPARSE) as run:
            yield Product(run=run)


def _entry(shape: Shape, dtype: str, variant: str, seconds: Sequence[float]) -> Entry:
    low, middle, high = (1e3 * float(value) for value in np.percentile(seconds, [25, 50, 75]))
    return Entry(
        m=shape.m,
        k=shape.k,
        n=shape.n,
        dtype=dtype,
        variant=variant,
        ms=middle,
        low_ms=low,
        high_ms=high,
        rounds=len(seconds),
    )


def _name(key: tuple[Shape, str]) -> str:
    return f"{key[0]} {key[1]}"


def _once(product: Product) -> float:
    """Seconds of one run, after one that does not count."""
    product.run()
    started = perf_counter()
    product.run()
    return perf_counter() - started
