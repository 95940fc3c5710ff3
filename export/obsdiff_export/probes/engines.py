"""Which number formats the engine builders really take: an engine of one product each. Run by `asking.ask`.

The vendors' packages only, without Polygraphy, so that a failure is theirs.
"""

import functools
import importlib
from typing import Any

from obsdiff_export.probes.graphs import ROWS, SIZE, error, factors, product


def build(question: str) -> dict[str, Any]:
    """Builds one engine, and runs it where torch has the GPU.

    Args:
        question: "tensorrt_rtx/8.6/fp16": package, compute capability, format; "here" for the GPU of this machine.

    Returns:
        "bytes" of the plan; "error", relative, None where it was not run.

    Raises:
        RuntimeError: the builder refused; with its own words.
        ArithmeticError: the engine ran and computed something else.
    """
    package, target, form = question.split("/")
    trt = importlib.import_module(package)
    logger = _logger(package)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, logger).parse(product(form)):
        raise RuntimeError(logger.words("the parser refused the graph"))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if target != "here" and not _aim(trt, config, target):
        raise RuntimeError(f"it does not build for {target}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(logger.words("the builder gave no plan"))
    ran = _run(trt, logger, plan) if target == "here" else None
    return {"bytes": plan.nbytes, "error": ran}


def _aim(trt: Any, config: Any, target: str) -> bool:
    """Sets the one compute capability to build for, where the builder takes any but that of its own GPU."""
    if not hasattr(config, "set_compute_capability"):
        return False
    capability = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
    config.num_compute_capabilities = 1
    return capability is not None and bool(config.set_compute_capability(capability, 0))


def _run(trt: Any, logger: Any, plan: Any) -> float | None:
    """Error of the product on the GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(logger.words("the runtime refused the plan"))
    context = engine.create_execution_context()
    x, y = torch.from_numpy(factors()[0]).cuda(), torch.zeros(ROWS, SIZE, device="cuda")
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError(logger.words("the engine did not run"))
    stream.synchronize()
    return error(y.cpu().numpy())


@functools.cache
def _logger(package: str) -> Any:
    """One for the process: a second one would be ignored."""
    trt = importlib.import_module(package)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)

        def words(self, otherwise: str) -> str:
            return " | ".join(self.errors[:2]) or otherwise

    return Logger()
