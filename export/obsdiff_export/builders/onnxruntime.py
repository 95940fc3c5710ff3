"""ONNX Runtime: the graph after its offline optimisation, for one provider, or a TensorRT engine inside a graph.

What is called a plan here is a graph that ONNX Runtime loads as it is:

    onnxruntime             CPU or CUDA provider: fused operators, weights beside it in `<key>.data`
    onnxruntime_tensorrt    TensorRT provider: an EP-context graph, whose one node names the engine in `<key>.data`

ONNX Runtime falls back in silence: from a provider that does not load to another, and node by node to the CPU. So it
is told not to, and asked afterwards which provider each node was given to: products of matrices anywhere else are a
refusal, other nodes (the arithmetic of shapes) are told of.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import onnx

from obsdiff_export.builders.request import Flags, Log, RefusalError, Request, Shapes
from obsdiff_export.gpu import compute_capability
from obsdiff_runtime.errors import CompatibilityError
from obsdiff_runtime.gpus import find_gpus

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"

_PACKAGES: Final = ("onnxruntime-gpu", "onnxruntime")
_HEAVY: Final = ("MatMul", "Gemm", "Conv", "Attention")
"""In the names of the operators that the time goes to: FusedMatMul, QGemm, ConvTranspose, MultiHeadAttention, ..."""
_SMALLEST_OUTSIDE_BYTES: Final = 1024
_CAST: Final = "InsertedPrecisionFreeCast"
"""Begins the names of the casts that ONNX Runtime puts around operators that it has in float32 only."""


class OnnxRuntime:
    """On the CPU, or on a GPU by ONNX Runtime's own kernels: targets are "cpu" and "cuda"."""

    name = "onnxruntime"
    extra = "cpu"
    environment: Mapping[str, str] = {}
    times_tactics = False

    def missing(self) -> str:
        return "" if find_spec("onnxruntime") is not None else "onnxruntime not installed"

    def version(self) -> str:
        return _version()

    def device(self) -> str:
        return ""

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        """("cpu",) or ("cuda:8.9",); the GPU where this ONNX Runtime and this machine have one, else the CPU."""
        has_cuda = compute_capability() is not None and CUDA in _providers()
        named = list(dict.fromkeys(target.partition(":")[0] for target in asked)) or ["cuda" if has_cuda else "cpu"]
        if len(named) > 1 or named[0] not in ("cpu", "cuda"):
            raise CompatibilityError(f"ONNX Runtime builds for one of cpu and cuda, not for {', '.join(asked)}")
        if named == ["cuda"] and not has_cuda:
            raise CompatibilityError(_without(CUDA))
        return ("cpu",) if named == ["cpu"] else (f"cuda:{compute_capability()}",)

    def check(self, flags: Flags, targets: Sequence[str]) -> None:
        given = {
            "--refit": flags.refit != "no",
            "--weight-streaming": flags.weight_streaming,
            "--optimization-level": flags.optimization_level is not None,
        }
        for flag, is_given in given.items():
            if is_given:
                raise CompatibilityError(f"{flag} is TensorRT's; ONNX Runtime's own providers have no such thing")

    def compile(self, request: Request, log: Log) -> bytes | memoryview:
        import onnxruntime

        provider = CPU if request.targets == ("cpu",) else CUDA
        if provider == CPU:
            _refuse_bfloat16(request.onnx)
        plan = Path(request.plan).with_name("optimised.onnx")
        options = _options(onnxruntime)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(plan)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", request.data)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(_SMALLEST_OUTSIDE_BYTES)
        )
        session = _open(onnxruntime, request.onnx, options, [provider])
        _check_placement(session, provider, log)
        del session
        _tell_of_casts(plan, log)
        options = _options(onnxruntime)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        _open(onnxruntime, str(plan), options, [provider])
        return plan.read_bytes()


class OnnxRuntimeTensorRt:
    """TensorRT inside ONNX Runtime, for the GPU of this machine, with one profile."""

    name = "onnxruntime_tensorrt"
    extra = "gpu"
    environment: Mapping[str, str] = {}
    times_tactics = False

    def missing(self) -> str:
        if find_spec("onnxruntime") is None:
            return "onnxruntime not installed"
        if compute_capability() is None:
            return "no NVIDIA GPU is visible"
        return "" if TENSORRT in _providers() else _without(TENSORRT)

    def version(self) -> str:
        """That of ONNX Runtime, and of the TensorRT package beside it where there is one."""
        try:
            return f"{_version()} with tensorrt {version('tensorrt')}"
        except PackageNotFoundError:
            return _version()

    def device(self) -> str:
        devices = find_gpus().devices
        return devices[0].name if devices else ""

    def targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        here = compute_capability() or "none"
        if any(target != here for target in asked):
            raise CompatibilityError(
                f"TensorRT builds for the GPU of this machine ({here}), not for {', '.join(asked)}; "
                "build on the machine that serves"
            )
        return (here,)

    def check(self, flags: Flags, targets: Sequence[str]) -> None:
        if flags.refit != "no" or flags.weight_streaming:
            raise CompatibilityError(
                "--refit and --weight-streaming are not to be had inside ONNX Runtime; take --builder tensorrt"
            )

    def compile(self, request: Request, log: Log) -> bytes | memoryview:
        import onnxruntime

        if len(request.profiles) != 1:
            raise RefusalError(
                "incompatible",
                f"TensorRT inside ONNX Runtime has one profile, and {len(request.profiles)} are asked for; "
                "take --builder tensorrt, or one --profile",
            )
        plan = Path(request.plan).with_name("context.onnx")
        options = _options(onnxruntime)
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(plan))
        options.add_session_config_entry("ep.context_embed_mode", "0")
        session = _open(onnxruntime, request.onnx, options, [(TENSORRT, provider_options(request, plan.parent)), CUDA])
        _check_placement(session, TENSORRT, log)
        del session
        return _renamed(plan, request.data)


def provider_options(request: Request, folder: Path) -> dict[str, str]:
    """What the TensorRT provider is told."""
    flags = request.flags
    options = {
        "trt_sparsity_enable": str(int(flags.sparse)),
        "trt_detailed_build_log": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        **{f"trt_profile_{end}_shapes": _shapes(request.profiles[0], end) for end in ("min", "opt", "max")},
    }
    if flags.optimization_level is not None:
        options["trt_builder_optimization_level"] = str(flags.optimization_level)
    return options


def _shapes(profile: Mapping[str, Shapes], end: str) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, sizes[end]))}" for name, sizes in profile.items() if sizes[end])


def _renamed(context: Path, name: str) -> bytes:
    """The context graph, with the one engine that it names moved to `name`."""
    if not context.exists():
        raise RefusalError("refused", "ONNX Runtime wrote no EP-context graph; its log says more")
    model = onnx.load(str(context))
    nodes = [node for node in model.graph.node if node.op_type == "EPContext"]
    if len(nodes) != 1 or len(model.graph.node) != 1:
        others = ", ".join(sorted({node.op_type for node in model.graph.node if node.op_type != "EPContext"}))
        raise RefusalError(
            "refused", f"TensorRT took {len(nodes)} parts of the graph and left the rest to others: {others or 'none'}"
        )
    for attribute in nodes[0].attribute:
        if attribute.name == "ep_cache_context":
            (context.parent / Path(attribute.s.decode()).name).replace(context.parent / name)
            attribute.s = name.encode()
    return bytes(model.SerializeToString())


def _open(onnxruntime: Any, path: str, options: Any, providers: Sequence[Any]) -> Any:
    """A session on the first of these providers and on no other.

    Raises:
        RefusalError: it cannot be had.
    """
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if wanted not in onnxruntime.get_available_providers():
        raise RefusalError("incompatible", _without(wanted))
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(providers), enable_fallback=0)
    except Exception as error:
        text = " ".join(str(error).split())
        kind = "memory" if "bad_alloc" in text or "out of memory" in text.lower() else "refused"
        raise RefusalError("memory" if kind == "memory" else "refused", text) from error
    used = session.get_providers()
    if not used or used[0] != wanted:
        raise RefusalError(
            "incompatible", f"{wanted} was asked for and ONNX Runtime took {', '.join(used) or 'none'}: see its log"
        )
    return session


def _check_placement(session: Any, provider: str, log: Log) -> None:
    """Reads back which provider each node was given to.

    Raises:
        RefusalError: a product of matrices runs on another one, or nothing runs on this one.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        log("NOTE", f"this ONNX Runtime does not tell which nodes run on {provider}; it may be any number of them")
        return
    placed = [(part.ep_name, node.op_type, node.name) for part in ask() for node in part.get_nodes()]
    for name, operator, node in placed:
        log("INFO", f"[obsdiff] {name} runs {operator} {node}")
    counts = Counter(name for name, _, _ in placed)
    strays = [entry for entry in placed if entry[0] != provider]
    heavy = [entry for entry in strays if any(word in entry[1] for word in _HEAVY)]
    if heavy or not counts[provider]:
        name, operator, node = (heavy or strays or [("nothing", "nothing", "")])[0]
        raise RefusalError(
            "incompatible",
            f"{provider} was asked for, and ONNX Runtime gave {len(heavy)} products of matrices to others: "
            f"{name} would run {operator} {node}",
        )
    if strays:
        others = Counter(operator for _, operator, _ in strays)
        told = ", ".join(f"{count} {operator}" for operator, count in others.most_common(3))
        log("NOTE", f"{len(strays)} of {len(placed)} nodes run on another provider than {provider}: {told}")


def _options(onnxruntime: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _refuse_bfloat16(path: str) -> None:
    graph = onnx.load(path, load_external_data=False).graph
    wide = onnx.TensorProto.BFLOAT16
    if any(tensor.data_type == wide for tensor in graph.initializer) or any(
        value.type.tensor_type.elem_type == wide for value in (*graph.input, *graph.output)
    ):
        raise RefusalError(
            "incompatible",
            "the graph is in bfloat16, for which ONNX Runtime has no kernels on the CPU; "
            "export it with --dtype fp32, or build it for a GPU",
        )


def _tell_of_casts(plan: Path, log: Log) -> None:
    graph = onnx.load(str(plan), load_external_data=False).graph
    casts = sum(node.name.startswith(_CAST) for node in graph.node)
    if casts:
        log(
            "NOTE",
            f"ONNX Runtime computes parts of this graph in float32 and casts back and forth, {casts} times a run: "
            "export it with --dtype fp32 to save that",
        )


def _providers() -> list[str]:
    import onnxruntime

    found: list[str] = onnxruntime.get_available_providers()
    return found


def _version() -> str:
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def _without(provider: str) -> str:
    return f"the ONNX Runtime that is installed here has no {provider}, or no GPU: pip install 'obsdiff[gpu]'"
