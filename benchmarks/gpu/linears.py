"""2:4 linears in torch, by cuSPARSELt with and without its algorithm search, against dense ones.

At the shapes of SD3-medium, FLUX.1 and SDXL. `sparse` is the algorithm that the search finds for these tokens,
`default` the one that torch takes unasked; both as CUDA graphs. `launched` is `sparse` called from Python.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from gpu import clock
from gpu.rows import Options, Row, Sheet, first_line
from obsdiff_export import semi_structured
from obsdiff_export.linears import Shape
from obsdiff_export.semi_structured import Algorithms, Compress

WIDTHS = {
    "SD3-medium": ((1536, 1536), (1536, 6144), (6144, 1536)),
    "FLUX": ((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072)),
    "SDXL": ((640, 640), (640, 5120), (2560, 640), (1280, 1280), (1280, 10240), (5120, 1280)),
}
"""(k, n) of the linears that are pruned, by model."""

TOKENS = (4096, 1024, 16384, 2048, 8192)
"""In the order in which they are tried: a short time is spent on the first."""

CASE_SECONDS = 0.25


@dataclass(frozen=True)
class Case:
    model: str
    dtype: str
    shape: Shape


def cases(options: Options) -> Iterator[Case]:
    widths = {"tiny": ((32, 64), (64, 32))} if options.tiny else WIDTHS
    tokens = (8, 16) if options.tiny else TOKENS[:1] if options.quick else TOKENS
    for count in tokens:
        for dtype in ("bfloat16",) if options.quick else ("bfloat16", "float16"):
            for model, shapes in widths.items():
                for k, n in shapes:
                    yield Case(model, dtype, Shape(count, k, n))


def run(sheet: Sheet, options: Options, compress: Compress = semi_structured.compress) -> None:
    """`compress` makes the sparse weight; a CPU has no kernels for it."""
    searches = {name: Algorithms(name) for name in semi_structured.DTYPES} if options.device == "cuda" else {}
    left = 0
    for (_, dtype), group in groupby(cases(options), key=lambda case: (case.shape.m, case.dtype)):
        waiting = list(group)
        if sheet.left() > 0 and searches:
            searches[dtype].find(case.shape for case in waiting)
        for case in waiting:
            if sheet.left() <= 0:
                left += 1
                continue
            shape = case.shape
            algorithm = searches[dtype].best(shape) if searches else 0
            with sheet.case(model=case.model, dtype=dtype, tokens=shape.m, k=shape.k, n=shape.n) as row:
                row.figures["algorithm"] = algorithm
                measure(row, case, options, compress, algorithm)
    sheet.not_reached(left)


def measure(row: Row, case: Case, options: Options, compress: Compress, algorithm: int) -> None:
    """Fills the row; a kernel that is absent leaves the dense time and its reason."""
    weight, x = semi_structured.example(case.shape, getattr(torch, case.dtype), torch.device(options.device))
    weights = {"dense": weight}
    makers: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: compress(weight, algorithm),
        "default": lambda: semi_structured.compress(weight),
    }
    for name, make in makers.items():
        try:
            weights[name] = make()
        except Exception as error:  # whatever this torch lacks
            row.error = row.error or f"{name}: {first_line(error)}"
    calls: dict[str, clock.Call] = {name: partial(functional.linear, x, used) for name, used in weights.items()}
    if options.device == "cuda":
        launched = partial(functional.linear, x, weights.get("sparse", weight))
        calls = {name: clock.graphed(call, options.device) for name, call in calls.items()}
        calls["launched"] = launched
    row.figures |= clock.figures(clock.times(calls, options.device, 0 if options.tiny else CASE_SECONDS), "dense", "us")
    if "sparse" in weights:
        expected = functional.linear(x, weight)
        found = functional.linear(x, weights["sparse"])
        row.figures["max_relative_difference"] = semi_structured.difference(found, expected)
