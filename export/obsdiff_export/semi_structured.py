"""2:4 in torch on a GPU: semi-structured tensors, by cuSPARSELt and its search where torch has it, or CUTLASS.

    m       tokens
    weight  (n, k), as nn.Linear keeps it; every four consecutive weights along k hold two zeros

A measured reference, and what `whatif` uses where TensorRT is absent. Nothing is assumed to be faster:
`use_where_faster` times each linear at its own tokens, keeps the dense weight where 2:4 does not win, and checks what
it computes.

A launch of a 2:4 product takes the host half a millisecond in torch 2.11, as long as a product of 4096 x 15360 x 3072
takes an H200. So kernels are timed as CUDA graphs, in which the host has no part: as an engine would run them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from obsdiff_export.asking import Outcome, ask
from obsdiff_export.latency_table import SPARSE
from obsdiff_export.linears import Shape
from obsdiff_export.measuring import FEWEST, Product, Variant, is_faster
from obsdiff_runtime.errors import CompatibilityError, ConfigError, RunError, first_line
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.timing import Comparison, compare, interleaved

DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16}

TOLERANCE: Final = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from the dense product, relative to its largest value: both round their sums to the format, whose
steps are 1e-3 and 8e-3, in another order."""

RUN_SECONDS: Final = 2e-3
"""A timed run repeats its product for about so long: a launch alone takes some 1e-5 s."""

MOST_CALLS: Final = 100
"""In one CUDA graph: every call has an output of its own there."""

ROUNDS: Final = 30

MOST_ALGORITHMS: Final = 64
"""Tried of a product. cuSPARSELt 0.8.0 has 21 for bfloat16 on an H200, and says no to a higher number."""

SEARCH_SECONDS: Final = 15.0
SHAPE_SECONDS: Final = 3.0
"""For a search: to begin, and for each product."""

Compress = Callable[[Tensor, int], Tensor]
"""(weight, number of an algorithm) -> a weight that multiplies the same by sparse kernels."""


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """What became of one linear.

    Attributes:
        sparse: whether it multiplies by sparse kernels now.
        comparison: of 2:4 with dense; None where it was not timed.
        error: largest difference from dense, relative to its largest value.
        reason: why it stays dense, "" where it does not.
    """

    name: str
    shape: Shape
    sparse: bool
    comparison: Comparison | None
    error: float | None
    reason: str


def is_2_of_4(weight: Tensor) -> bool:
    """Whether every four consecutive weights along k, (n, k), hold two zeros at least."""
    n, k = weight.shape
    return k % 4 == 0 and bool(((weight == 0).view(n, k // 4, 4).sum(-1) >= 2).all())


class Algorithms:
    """Which of cuSPARSELt's algorithms is fastest for a product; on Hopper the default one is slower than dense ones.

    torch's own search broke the CUDA context of its process on an H200 (torch 2.11, cuSPARSELt 0.8.0; so did some of
    the algorithms when called by number), and nothing can be computed in that process any more. So they are tried here
    in a process of their own, one after the other, until one fails; that one and those behind it are left out.
    """

    def __init__(self, dtype: str, ask: Callable[..., Mapping[str, Outcome]] = ask) -> None:
        self._dtype, self._ask = dtype, ask
        self._end = MOST_ALGORITHMS
        self._best: dict[Shape, int] = {}

    def best(self, shape: Shape) -> int:
        """Its number; 0, the default, where nothing could be found out."""
        if shape not in self._best:
            self.find([shape])
        return self._best[shape]

    def find(self, shapes: Iterable[Shape]) -> None:
        """Finds the best one for each of these, all in one process."""
        wanted = [shape for shape in dict.fromkeys(shapes) if shape not in self._best]
        questions = {
            (algorithm, shape): f"{self._dtype}/{shape.m}x{shape.k}x{shape.n}/{algorithm}"
            for algorithm in range(self._end)
            for shape in wanted
        }
        outcomes = self._ask(
            "obsdiff_export.probes.cusparselt:seconds",
            list(questions.values()),
            timeout_s=SEARCH_SECONDS + SHAPE_SECONDS * len(wanted),
            until_one_ends_it=True,
        )
        seconds = {key: outcomes[question].value for key, question in questions.items()}
        self._end = next((number for (number, _), value in seconds.items() if value is None), self._end)
        for shape in wanted:
            times = {number: seconds[number, shape] for number in range(self._end)}
            self._best[shape] = min(times, key=times.__getitem__) if times else 0


def compress(weight: Tensor, algorithm: int = 0) -> Tensor:
    """A 2:4 weight as a semi-structured tensor.

    Args:
        weight: (n, k), on the GPU, float16 or bfloat16.
        algorithm: of cuSPARSELt's, see `Algorithms`.

    Raises:
        CompatibilityError: this torch or GPU has no kernels for it.
    """
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    available, forced = torch.backends.cusparselt.is_available(), SparseSemiStructuredTensor._FORCE_CUTLASS
    SparseSemiStructuredTensor._FORCE_CUTLASS = not available
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype stage.*", category=UserWarning)
            made: Any = to_sparse_semi_structured(weight)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise CompatibilityError(
            f"torch {torch.__version__} has no 2:4 kernel here for a weight of {tuple(weight.shape)} in "
            f"{weight.dtype}: {first_line(error)}"
        ) from error
    finally:
        SparseSemiStructuredTensor._FORCE_CUTLASS = forced
    if available:  # older torch takes these nowhere else; newer torch always writes the product as (m, n)
        made.alg_id_cusparselt, made.fuse_transpose_cusparselt = algorithm, True
    return cast(Tensor, made)


def give(linear: nn.Linear, sparse: Tensor) -> None:
    """Lets a linear multiply by what `compress` made; changes it.

    Its input is made contiguous first: torch multiplies slices of a longer sequence in a way that semi-structured
    tensors do not know.
    """
    linear.weight = nn.Parameter(sparse, requires_grad=False)
    linear.register_forward_pre_hook(lambda _, given: tuple(tensor.contiguous() for tensor in given))


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same work on the GPU as one CUDA graph, whose memory is fixed; replayed when called, not waited for."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    return graph.replay


class TorchCuda:
    """torch on the GPU: dense products by its own kernels, 2:4 by semi-structured tensors; see measuring.Measurer."""

    backend = "torch"

    def __init__(
        self, dtype: str, device: str = "cuda", compress: Compress = compress, algorithms: Algorithms | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"2:4 in torch is timed in {' or '.join(DTYPES)}, not in {dtype}; choose with --dtype")
        self.dtype, self._device, self._compress = dtype, torch.device(device), compress
        self._algorithms = algorithms or Algorithms(dtype)

    def device(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"

    def versions(self) -> dict[str, str]:
        library = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
        found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
        return found | ({} if library is None else {"cusparselt": str(library)})

    def without_sparse(self) -> str:
        if self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) < (8, 0):
            return "this GPU has no sparse tensor cores; they came with compute capability 8.0"
        return ""

    @contextmanager
    def prepare(self, shape: Shape, variant: Variant) -> Iterator[Product]:
        weight, x = example(shape, DTYPES[self.dtype], self._device)
        used = self._compress(weight, self._algorithms.best(shape)) if variant == SPARSE else weight
        yield _product(lambda: functional.linear(x, used), self._device)


def example(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random operands: a 2:4 weight (n, k) where k allows it, and tokens (m, k)."""
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(shape.n, shape.k, generator=generator, device=device)
    if shape.k % 4 == 0:
        groups = weight.view(shape.n, shape.k // 4, 4)
        smallest = groups.abs().argsort(-1)[..., :2]  # (n, k / 4, 2)
        groups.scatter_(-1, smallest, 0.0)
    x = torch.randn(shape.m, shape.k, generator=generator, device=device)
    return (weight / shape.k**0.5).to(dtype), x.to(dtype)


def use_where_faster(
    module: nn.Module,
    tokens: Mapping[str, int],
    *,
    compress: Compress = compress,
    algorithms: Algorithms | None = None,
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> tuple[Replaced, ...]:
    """Gives the 2:4 linears of a module semi-structured weights where that was measured to be faster; changes it.

    Args:
        module: in float16 or bfloat16, on the GPU, in eval mode.
        tokens: linear -> how many it runs over in a call.
        compress: makes the sparse weight.
        algorithms: of the module's format; None: the default one for all.
        rounds: timed rounds of each shape, as CUDA graphs; linears of one shape are timed once.
        progress: told of stage "2:4 in torch".

    Returns:
        one record for each linear of `tokens`.

    Raises:
        ConfigError: too few rounds.
        RunError: sparse kernels compute something else.
    """
    if rounds < FEWEST:
        raise ConfigError(f"{rounds} rounds are too few to tell a gain from noise; take {FEWEST} or more")
    verdicts: dict[Shape, Comparison] = {}
    found = []
    for index, (name, count) in enumerate(tokens.items()):
        progress("2:4 in torch", index, len(tokens), name)
        linear = module.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ConfigError(f"{name} is a {type(linear).__name__}, not a linear")
        shape = Shape(count, linear.in_features, linear.out_features)
        found.append(_use(name, linear, shape, compress, algorithms, rounds, verdicts))
    progress("2:4 in torch", len(tokens), len(tokens))
    return tuple(found)


def _use(
    name: str,
    linear: nn.Linear,
    shape: Shape,
    compress: Compress,
    algorithms: Algorithms | None,
    rounds: int,
    verdicts: dict[Shape, Comparison],
) -> Replaced:
    weight = linear.weight.detach()

    def dense(reason: str, comparison: Comparison | None = None, error: float | None = None) -> Replaced:
        return Replaced(name=name, shape=shape, sparse=False, comparison=comparison, error=error, reason=reason)

    if weight.dtype not in TOLERANCE:
        return dense(f"its weight is {weight.dtype}; sparse kernels take float16 and bfloat16")
    if not is_2_of_4(weight):
        return dense("its weight is not 2:4")
    x = torch.randn(shape.m, shape.k, device=weight.device).to(weight.dtype)
    try:
        sparse = compress(weight, 0 if algorithms is None else algorithms.best(shape))
        error = difference(functional.linear(x, sparse), functional.linear(x, weight))
    except CompatibilityError as refusal:
        return dense(str(refusal))
    if not error <= TOLERANCE[weight.dtype]:
        raise RunError(
            f"{name}: the sparse product differs from the dense one by {error:.2g} of its largest value, more than "
            f"{TOLERANCE[weight.dtype]:.2g}; do not use 2:4 in torch here, and report it with torch's version"
        )
    if shape not in verdicts:
        verdicts[shape] = _race(x, weight, sparse, rounds)
    comparison = verdicts[shape]
    if not is_faster(comparison):
        return dense(f"not faster beyond noise: {comparison.verdict}", comparison, error)
    give(linear, sparse)
    return Replaced(name=name, shape=shape, sparse=True, comparison=comparison, error=error, reason="")


def _race(x: Tensor, weight: Tensor, sparse: Tensor, rounds: int) -> Comparison:
    runs = {
        kind: _product(lambda used=used: functional.linear(x, used), x.device)  # type: ignore[misc]
        for kind, used in (("dense", weight), (SPARSE, sparse))
    }
    seconds = interleaved({kind: product.run for kind, product in runs.items()}, rounds, 2, silent)
    per_call = {kind: [value / runs[kind].calls for value in values] for kind, values in seconds.items()}
    return compare(SPARSE, per_call[SPARSE], "dense", per_call["dense"])


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest expected value."""
    largest = float(expected.abs().max())
    return float((found.float() - expected.float()).abs().max()) / (largest or 1.0)


def _product(multiply: Callable[[], Tensor], device: torch.device) -> Product:
    """As many calls a run as take RUN_SECONDS, in one CUDA graph where there is a GPU, with one wait at the end."""

    def repeat(calls: int) -> None:
        with torch.no_grad():
            for _ in range(calls):
                multiply()

    def timed(run: Callable[[], object]) -> float:
        def once() -> None:
            run()
            _wait(device)

        (seconds,) = interleaved({"once": once}, 3, 1, silent).values()
        return min(seconds)

    if device.type != "cuda":
        calls = max(1, int(RUN_SECONDS / max(timed(lambda: repeat(1)), 1e-6)))
        return Product(run=lambda: repeat(calls), calls=calls)
    one = graphed(lambda: repeat(1))
    calls = max(1, min(int(RUN_SECONDS / max(timed(one), 1e-6)), MOST_CALLS))
    replay = graphed(lambda: repeat(calls))

    def run() -> None:
        replay()
        _wait(device)

    return Product(run=run, calls=calls)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
