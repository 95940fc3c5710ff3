"""How long cuSPARSELt's algorithms take for a 2:4 product, in torch. Run by `asking.ask`: some end the process."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from obsdiff_export import semi_structured
from obsdiff_export.linears import Shape

LAUNCHES = 10
REPLAYS = 5


def seconds(question: str) -> float:
    """Of one product, as a CUDA graph.

    Args:
        question: "float16/4096x1536x6144/3": format, m x k x n, the algorithm's number.

    Raises:
        ArithmeticError: the product is wrong.
        RuntimeError: there is no such algorithm, or it cannot do this product.
    """
    dtype, sizes, algorithm = question.split("/")
    weight, x, expected = _operands(dtype, sizes)
    sparse = semi_structured.compress(weight, int(algorithm))

    def multiply() -> Tensor:
        return functional.linear(x, sparse)

    difference = semi_structured.difference(multiply(), expected)
    if not difference <= semi_structured.TOLERANCE[x.dtype]:
        raise ArithmeticError(f"the product is off by {difference:.1e} of its largest entry")

    def repeat() -> None:
        for _ in range(LAUNCHES):
            multiply()

    replay = semi_structured.graphed(repeat)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    found = []
    for _ in range(REPLAYS):
        start.record()
        replay()
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)) / 1e3 / LAUNCHES)
    return min(found)


@functools.cache
def _operands(dtype: str, sizes: str) -> tuple[Tensor, Tensor, Tensor]:
    """The weight, (n, k); tokens, (m, k); what the dense product is, (m, n)."""
    m, k, n = (int(size) for size in sizes.split("x"))
    weight, x = semi_structured.example(Shape(m, k, n), getattr(torch, dtype), torch.device("cuda"))
    return weight, x, functional.linear(x, weight)
