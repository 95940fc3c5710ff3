"""What each witness of sparse kernels says, before anything is concluded: the log's lines and the kernels' names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from obsdiff_export.proof.layers import EngineLayer

Kernel = Literal["sparse", "dense", "silent"]

_FOUND: Final = (
    re.compile(r"\(Sparsity\) Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics(?:: *(?P<names>.*))?"),
    re.compile(r"\(Sparsity\) Layers eligible for sparse math:(?P<names>.*)"),
)
_CHOSE: Final = (
    re.compile(r"\(Sparsity\) Chose (?P<count>\d+) layer\(s\) using sparse tactics(?:: *(?P<names>.*))?"),
    re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(?P<names>.*)"),
)
_SPARSE_KERNEL: Final = re.compile(r"spars|sptensor|spmma|spgemm|(?<![a-z])sp_?gemm", re.IGNORECASE)
_DENSE_KERNEL: Final = re.compile(r"gemm|gemv|xmma|cutlass|cublas|cudnn|nvjet|fprop|implicit", re.IGNORECASE)
_KINDS: Final = frozenset(
    {
        "gemm",
        "runtime_fusion",
        "fusion",
        "matrixmultiply",
        "matrix_multiply",
        "fullyconnected",
        "convolution",
        "correlation",
        "myelin",
        "caskgemmmatrixmultiply",
        "caskgemmconvolution",
        "caskconvolution",
        "cublasgemm",
        "gemmfusion",
    }
)
"""Kinds of layers that multiply, in lower case."""
_SUFFIX: Final = re.compile(r"(?: \[profile \d+\])?(?:_myl\d+_\d+)?(?: \[profile \d+\])?$")


@dataclass(frozen=True, kw_only=True)
class SparsityLog:
    """What a builder's log says of sparse tactics; None where it says nothing.

    Attributes:
        found, chose: how many layers were eligible, and how many use sparse kernels.
        found_layers, chose_layers: their names, as far as the log gives them.
    """

    found: int | None
    chose: int | None
    found_layers: tuple[str, ...] = ()
    chose_layers: tuple[str, ...] = ()


def parse_log(text: str) -> SparsityLog:
    """Reads both dialects of TensorRT's lines, 8.x and 10 on; the last pair counts, for builders try more than once."""
    found, chose = _last(_FOUND, text), _last(_CHOSE, text)
    if found is not None and chose is not None and chose.start() < found.start():
        chose = None  # of an earlier try
    found_layers, chose_layers = _names(found), _names(chose)
    return SparsityLog(
        found=_count(found, found_layers),
        chose=_count(chose, chose_layers),
        found_layers=found_layers,
        chose_layers=chose_layers,
    )


def kernel_of(tactic: str) -> Kernel:
    """What the name of a kernel says.

    Fused kernels are named after what they compute ("__myl_TranSpMmAdd_0x..."), or not at all: those say nothing,
    unless they say it in full.
    """
    spelled = tactic.startswith(("__my", "_gemm_mha"))
    if _SPARSE_KERNEL.search(tactic) and (not spelled or "sparse" in tactic.lower()):
        return "sparse"
    return "dense" if _DENSE_KERNEL.search(tactic) and not spelled else "silent"


def parts_of(name: str) -> tuple[str, ...]:
    """The nodes in the name of a layer: "a+b_myl0_2", "a || b" and "a + b" are a and b."""
    bare = [_SUFFIX.sub("", part.strip()) for part in re.split(r" \+ | \|\| |\+", name)]
    return tuple(part for part in bare if part)


def by_node(layers: Iterable[EngineLayer]) -> dict[str, list[EngineLayer]]:
    """The layers that name a node, in their metadata or, where they have none, in their name."""
    named: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in dict.fromkeys(layer.onnx_nodes or parts_of(layer.name)):
            named.setdefault(node, []).append(layer)
    return named


def computing(named: Sequence[EngineLayer]) -> tuple[EngineLayer, ...]:
    """Of the layers that name a node, those that multiply with its weight: several where an engine has profiles.

    A node's name is also on layers that only prepare its operands or add its bias: those with a kernel that multiplies,
    or of a kind that does, come before them.
    """
    multiplies = [layer for layer in named if kernel_of(layer.tactic) != "silent"]
    return tuple(multiplies or [layer for layer in named if layer.kind.lower() in _KINDS])


def joined(names: Iterable[str], most: int = 3) -> str:
    """a, b, c and 4 more."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _last(patterns: Sequence[re.Pattern[str]], text: str) -> re.Match[str] | None:
    matches = [match for pattern in patterns for match in pattern.finditer(text)]
    return max(matches, key=lambda match: match.start()) if matches else None


def _count(match: re.Match[str] | None, names: Sequence[str]) -> int | None:
    """What the line says, or as many as it names: the dialect of 8.x has no number."""
    if match is None:
        return None
    return int(match.groupdict().get("count") or len(names))


def _names(match: re.Match[str] | None) -> tuple[str, ...]:
    """The names after the colon, split at commas outside brackets: "Conv_1 + PWN(Sigmoid_2, Mul_3)" is one."""
    names, depth = [""], 0
    for char in (match["names"] or "") if match is not None else "":
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth <= 0:
            names.append("")
        else:
            names[-1] += char
    return tuple(name.strip() for name in names if name.strip())
