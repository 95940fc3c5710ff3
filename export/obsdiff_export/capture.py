"""A module becomes an ONNX graph in memory: torch.export captures it, torch.onnx translates the capture."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.onnx.errors import OnnxExporterError

from obsdiff_export.casting import emptied, inputs_in
from obsdiff_export.component import Component
from obsdiff_export.economies import spared
from obsdiff_export.stored import values
from obsdiff_export.translations import translations
from obsdiff_runtime.errors import ExportError

_COMPUTED: Final = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.matmul.default})
"""Operations that never give a view of what they read, nor it itself."""


def lower(component: Component, dtype: torch.dtype, opset: int) -> tuple[ir.Model, frozenset[str]]:
    """The graph, not optimised, and the names of its initializers that come from the module.

    It is captured on the parameters' shapes alone: their values are read, and cast, one by one when they are saved.

    Args:
        component: its module is as before afterwards.
        dtype: of the graph.
        opset: of the default domain.

    Raises:
        ExportError: the module could not be captured or translated.
    """
    parameters = dict(component.module.named_parameters(remove_duplicate=False))
    with torch.no_grad(), _silence():
        program = _capture(component, dtype)
        weights = frozenset(program.state_dict) | frozenset(program.constants)
        model = _translated(component, program, opset)
    for name, value in model.graph.initializers.items():
        if name in parameters:
            value.const_value = read_later(name, parameters[name], dtype)
    return model, weights


def _translated(component: Component, program: ExportedProgram, opset: int) -> ir.Model:
    plain = program.__class__
    try:
        program.__class__ = _Decomposed
        return _translate(component, program, opset)
    except OnnxExporterError:
        program.__class__ = plain
    try:
        return _translate(component, program, opset)
    except OnnxExporterError as error:
        raise ExportError(f"{component.name}: torch.onnx could not translate it: {_last_line(error)}") from error


def read_later(name: str, parameter: Tensor, dtype: torch.dtype) -> ir.LazyTensor:
    """A parameter's values as an initializer, read and cast each time they are asked for and never kept."""
    stored = dtype if parameter.is_floating_point() else parameter.dtype

    def read() -> ir.TensorProtocol:
        return TorchTensor(values(parameter).detach().to("cpu", stored), name=name)

    shape = ir.Shape(tuple(parameter.shape))
    return ir.LazyTensor(read, dtype=from_torch_dtype(stored), shape=shape, name=name, cache=False)


class _Decomposed(ExportedProgram):
    """A program whose operations all have a translation: retracing it, half of the export's time, is skipped."""

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        pure = not any(_changes_what_others_read(node) for node in calls)
        targets = {node.target for node in calls}
        nested = any(isinstance(target, HigherOrderOperator) for target in targets)
        if pure and not nested and decomp_table is not None and not targets & decomp_table.keys():
            return self
        retraced: ExportedProgram = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return retraced


def _changes_what_others_read(node: fx.Node) -> bool:
    """Whether an operation in place is one; of a tensor that was computed for it alone it is as any other."""
    operation = node.target
    if not isinstance(operation, OpOverload) or not operation._schema.is_mutable:
        return False
    if operation is torch.ops.aten.detach_.default:  # in place by name only; constants come with it
        return False
    changed = node.args[0]
    return not isinstance(changed, fx.Node) or changed.target not in _COMPUTED or len(changed.users) > 1


def _capture(component: Component, dtype: torch.dtype) -> ExportedProgram:
    """The module as a program with symbolic sizes; those of 0 and 1 are as any other."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    inputs = {
        name: mode.from_tensor(tensor, static_shapes=True)
        for name, tensor in inputs_in(dtype, component.inputs).items()
    }
    try:
        with (
            emptied(component.module, dtype, mode),
            torch.fx.experimental._config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
            _axes_of_a_name_equal(component),
        ):
            return torch.export.export(
                component.module,
                (),
                kwargs=inputs,
                dynamic_shapes={
                    name: {axis: Dim.DYNAMIC for axis in component.dynamic_axes.get(name, {})} for name in inputs
                },
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except Exception as error:
        raise ExportError(f"{component.name}: torch.export could not capture it: {_last_line(error)}") from error


@contextmanager
def _axes_of_a_name_equal(component: Component) -> Iterator[None]:
    """The module's forward begins with it: a quotient of two inputs' batches, say, is then known to be 1."""

    def check(_: nn.Module, __: Any, inputs: Mapping[str, Tensor]) -> None:
        sizes: dict[str, int] = {}
        for name, axes in component.dynamic_axes.items():
            for axis, symbol in axes.items():
                size = inputs[name].shape[axis]
                torch._check(sizes.setdefault(symbol, size) == size)  # type: ignore[no-untyped-call]

    handle = component.module.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _translate(component: Component, program: ExportedProgram, opset: int) -> ir.Model:
    with spared():
        found = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=list(component.inputs),
            output_names=list(component.outputs),
            custom_translation_table=translations(),
        )
    if found is None:
        raise ExportError(f"{component.name}: torch.onnx gave no graph")
    return found.model


def _last_line(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _silence() -> Iterator[None]:
    """Quiets what torch says about itself while exporting, inside only."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
