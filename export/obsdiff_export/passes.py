"""What is done to a captured graph: folding without touching weights, names, float64, provenance.

The exporter's own optimizer renames MatMul weights and merges equal ones. Here the weights are hidden (as inputs) while
constants are folded, so the graph never depends on their values and every name survives.

    n, k      a linear's output and input width
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from obsdiff_export.linears import TRANSPOSED


def simplify(model: ir.Model, weights: frozenset[str]) -> None:
    """Inlines, folds constants and drops dead and repeated nodes; changes the model, never a weight or its name.

    Args:
        model: changed in place.
        weights: names of the initializers that come from the module.
    """
    common.InlinePass()(model)
    with _hidden(model, weights):
        _fold_constants(model)
        common.RemoveUnusedNodesPass()(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)
    common.OutputFixPass()(model)


def drop_still_transposes(model: ir.Model) -> None:
    """A transposition that moves no axis is its input.

    ONNX Runtime up to 1.23 takes one before a Gemm for a real one, and then refuses the shapes of a batch of one.
    """
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or "perm" not in node.attributes:
            continue
        perm, source = list(node.attributes["perm"].as_ints()), node.inputs[0]
        if source is None or perm != sorted(perm) or node.outputs[0].is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
        model.graph.remove(node, safe=True)


def fold_transposes(model: ir.Model) -> None:
    """A weight (n, k) that is only transposed is stored as (k, n), named `<weight>::T`, computed when it is saved.

    It stands directly at the MatMul then: the form in which TensorRT looks for 2:4 weights and which ONNX Runtime maps.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
            continue
        source = node.inputs[0]
        if source is None or not source.is_initializer() or source.shape is None or len(source.shape) != 2:
            continue
        if (
            source.const_value is None
            or list(node.attributes["perm"].as_ints()) != [1, 0]
            or node.outputs[0].is_graph_output()
        ):
            continue
        name = f"{source.name}{TRANSPOSED}"
        folded = graph.initializers.get(name) or transposed(source.const_value, name)
        if name not in graph.initializers:
            graph.register_initializer(folded)
        ir.convenience.replace_all_uses_with(node.outputs[0], folded)
        graph.remove(node, safe=True)
        if not source.uses() and source.name is not None:
            del graph.initializers[source.name]


def lower_doubles(model: ir.Model) -> None:
    """float64 becomes float32: engines have no float64, and it only ever holds tables and constants."""
    double, single = ir.DataType.DOUBLE, ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        if value.dtype == double and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.dtype = single
    for node in model.graph.all_nodes():
        for key, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and key in ("to", "dtype") and attribute.as_int() == double:
                node.attributes[key] = ir.AttrInt64(key, int(single))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == double:
                node.attributes[key] = ir.AttrTensor(key, ir.tensor(attribute.as_tensor().numpy().astype("float32")))
        for output in node.outputs:
            if output.dtype == double:
                output.dtype = single


def name_axes(model: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """The exporter's symbols (s33) become the component's (height), also inside expressions (2*(s33//2)).

    Args:
        model: changed in place.
        axes: input name -> {axis: symbol}.
    """
    names = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(str(value.name), {}).items():
            symbol = value.shape[axis] if value.shape is not None else None
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names[str(symbol.value)] = name
    if not names:
        return
    known = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")\b")
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for axis, symbol in enumerate(value.shape):
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                value.shape[axis] = known.sub(lambda match: names[match[0]], str(symbol.value))


def strip(model: ir.Model, provenance: Mapping[str, str]) -> None:
    """Source positions and traces out, provenance in: the same module gives the same bytes."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.metadata_props.update(sorted(provenance.items()))
    common.NameFixPass()(model)


def _fold_constants(model: ir.Model) -> None:
    with _quiet("onnxscript.optimizer._constant_folding"):
        for _ in range(2):
            optimizer.fold_constants(model, onnx_shape_inference=False)


def transposed(tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """An initializer that is computed when it is saved."""
    n, k = tensor.shape.numpy()
    shape = ir.Shape((k, n))

    def turned() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().T.copy(), dtype=tensor.dtype, name=name)

    lazy = ir.LazyTensor(turned, dtype=tensor.dtype, shape=shape, name=name, cache=False)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)


@contextmanager
def _hidden(model: ir.Model, weights: frozenset[str]) -> Iterator[None]:
    """Weights are inputs inside; outside they are initializers again."""
    graph = model.graph
    visible = len(graph.inputs)
    kept = {}
    for name in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(name)
        kept[name] = (value, value.const_value)
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        del graph.inputs[visible:]
        for value, tensor in kept.values():
            value.const_value = tensor
            graph.register_initializer(value)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """One logger, silenced inside."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
