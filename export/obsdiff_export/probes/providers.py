"""What ONNX Runtime's providers really run: a session of one product each, no falling back. Run by `asking.ask`."""

import ctypes
import tempfile
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto

from obsdiff_export.probes.graphs import FORMATS, error, factors, product

CPU: Final = "CPUExecutionProvider"
_TELLS: Final = (CPU, "CUDAExecutionProvider")
"""Providers whose optimised graph can be written, and so looked at; the others compile theirs."""
_INTEGER: Final = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
)
_NAMES: Final = {number: name for name, number in FORMATS.items()} | {TensorProto.DOUBLE: "fp64"}


def multiply(question: str) -> dict[str, Any]:
    """One product in one session.

    Args:
        question: "CUDAExecutionProvider/fp16": provider and format.

    Returns:
        "error", relative; "computed_in", the format that the kernel works in, None where the provider hides it.

    Raises:
        RuntimeError: the provider is not there, does not load, or leaves the graph to another.
        ArithmeticError: the product is wrong.
    """
    import onnxruntime

    provider, _, form = question.partition("/")
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        if provider in _TELLS:
            options.optimized_model_filepath = str(optimized)
        try:
            session = onnxruntime.InferenceSession(product(form), options, providers=[provider])
        except Exception as failed:
            missing = unloadable(Path(onnxruntime.__file__).parent / "capi", provider)
            if missing:
                raise RuntimeError(f"it does not load: {missing}") from failed
            raise
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"onnxruntime chose {session.get_providers()[0]} instead")
        relative = error(session.run(None, {"x": factors()[0]})[0])
        return {"error": relative, "computed_in": _computed_in(optimized) if optimized.exists() else None}


def unloadable(folder: Path, provider: str) -> str:
    """What the library of a provider lacks, in the loader's words; "" where it loads or has none of its own.

    onnxruntime itself tells it to its log only, and says that it fell back.
    """
    name = provider.removesuffix("ExecutionProvider").lower()
    library, shared = (folder / f"libonnxruntime_providers_{part}.so" for part in (name, "shared"))
    if not library.exists():
        return ""
    try:
        ctypes.CDLL(str(shared), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return ""


def _computed_in(path: Path) -> str | None:
    """The format of the product's kernel, in the graph that onnxruntime made of ours."""
    graph = onnx.load(str(path)).graph
    if any(node.op_type in _INTEGER for node in graph.node):
        return "int8"
    kinds = {constant.name: constant.data_type for constant in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if "MatMul" not in node.op_type and "Gemm" not in node.op_type:
            continue
        for name in node.input:
            maker = made.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear":
                name = maker.input[1]  # its scale has the type of what it makes
            if name in kinds:
                return _NAMES.get(kinds[name])
    return None
