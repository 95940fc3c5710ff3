"""What torch.onnx does again for every network, done once: a third of the time that an export takes.

The graph is the same to the bit. torch's own classes are changed inside `spared` only; a torch that keeps them
elsewhere takes the time.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry
    from torch.onnx._internal.fx.passes import type_promotion

    _from_torchlib = ONNXRegistry.from_torchlib
    _Promoting = type_promotion._TypePromotionInterpreter
    _KNOWN = True
except (ImportError, AttributeError):
    _KNOWN = False


@contextmanager
def spared() -> Iterator[None]:
    """Inside, the table of known operations is made once an opset, and promoting types runs no operation again."""
    if not _KNOWN:
        yield
        return
    with _replaced(ONNXRegistry, "from_torchlib", staticmethod(_copied)), _replaced(_Promoting, "run_node", _promote):
        yield


@contextmanager
def _replaced(owner: type, name: str, by: object) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


@functools.cache
def _known(opset: int) -> Any:
    return _from_torchlib(opset_version=opset)


def _copied(opset_version: int) -> Any:
    """One that may be added to."""
    registry = ONNXRegistry()
    registry._opset_version = opset_version
    registry.functions = {target: list(found) for target, found in _known(opset_version).functions.items()}
    return registry


def _promote(self: Any, node: fx.Node) -> Any:
    """What the capture knows of a node stands for running it: casts of its inputs leave the type of its output."""
    if node.op != "call_function" or "val" not in node.meta:
        return fx.Interpreter.run_node(self, node)
    with self._set_current_node(node):
        rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            self._maybe_promote_node(node, rule)
    return node.meta["val"]
