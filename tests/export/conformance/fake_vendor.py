"""A TensorRT made from a surface: it has the classes and attributes of one version and no others, and does nothing.

`python fake_vendor.py tensorrt-10.3.0 requests.json` builds each request with our builder and Polygraphy on top of it,
and prints what was called. Run in a process of its own, because Polygraphy holds on to the first TensorRT it meets.
"""

import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vendor_calls import Surface, surfaces

CALLS: list[list[str]] = []
"""[class.method, arguments...] in order."""


class Memory(bytes):
    """What TensorRT gives bytes in: IHostMemory."""

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *error: object) -> None: ...


ANSWERS: dict[str, Any] = {
    "Builder.build_serialized_network": Memory(b"a plan"),
    "EngineInspector.get_engine_information": '{"Layers": []}',
    "IBuilderConfig.add_optimization_profile": 0,
    "IBuilderConfig.get_memory_pool_limit": 0,
    "IBuilderConfig.get_tactic_sources": 0,
    "IBuilderConfig.set_compute_capability": True,
    "IBuilderConfig.set_timing_cache": True,
    "INetworkDefinition.name": "graph",
    "INetworkDefinition.num_inputs": 1,
    "INetworkDefinition.num_outputs": 1,
    "INetworkDefinition.num_layers": 1,
    "ITensor.is_shape_tensor": False,
    "ITensor.name": "x",
    "ITensor.shape": (-1, 64),
    "OnnxParser.num_errors": 0,
    "OnnxParser.parse": True,
    "ITimingCache.combine": True,
    "ITimingCache.serialize": Memory(b"timings"),
    "OnnxParser.parse_from_file": True,
}


def make(surface: Surface, name: str) -> types.ModuleType:
    """The module of that version."""
    module: Any = types.ModuleType(name)
    module.__version__ = surface.name.partition("-")[2]
    classes: dict[str, type] = {}
    for path in sorted((path for path in surface.names if path), key=lambda path: path.count(".")):
        classes[path] = _class(path, surface, classes)
        outer, _, last = path.rpartition(".")
        setattr(classes[outer] if outer else module, last, classes[path])
    for attribute, kind in surface.names[""].items():
        if kind.endswith("()"):
            setattr(module, attribute, _function(attribute, kind[:-2], classes))
    return module


def _class(path: str, surface: Surface, classes: dict[str, type]) -> type:
    kinds = surface.names[path]
    members = {name for name, kind in kinds.items() if kind == path}

    def construct(self: Any, *arguments: Any, **named: Any) -> None:
        object.__setattr__(self, "_held", {})

    def hold(self: Any, name: str, value: Any) -> None:
        if type(self) is made and name not in kinds:  # as pybind's classes do; subclasses in Python may hold anything
            raise AttributeError(f"{path} has no {name}")
        CALLS.append([f"{path}.{name} =", repr(value)])
        object.__setattr__(self, name, value)

    body = {"__init__": construct, "__setattr__": hold, "__iter__": lambda self: iter(())}
    made = type(path.rpartition(".")[2], (), body)
    for name, kind in kinds.items():
        if name in members or kind.startswith("="):
            continue
        if kind.endswith("()"):
            setattr(made, name, _function(f"{path}.{name}", kind[:-2], classes))
        else:
            setattr(made, name, _property(path, name, kind, classes))
    for number, name in enumerate(sorted(members)):
        setattr(made, name, _member(made, name, number))
    if members:
        made.__members__ = {name: getattr(made, name) for name in sorted(members)}  # type: ignore[attr-defined]
    return made


def _member(kind: type, name: str, number: int) -> Any:
    member = kind()
    for key, value in {"name": name, "value": number}.items():
        member._held[key] = value
    for method in ("__int__", "__index__", "__hash__"):
        setattr(kind, method, lambda self: self._held.get("value", 0))
    kind.__repr__ = lambda self: str(self._held.get("name", "?"))  # type: ignore[method-assign, assignment]
    return member


def _property(path: str, name: str, kind: str, classes: dict[str, type]) -> property:
    def get(self: Any) -> Any:
        if name in self._held:
            return self._held[name]
        return ANSWERS.get(f"{path}.{name}", classes[kind]() if kind in classes else 0)

    def put(self: Any, value: Any) -> None:
        self._held[name] = value

    return property(get, put)


def _function(path: str, gives: str, classes: dict[str, type]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        CALLS.append([path, *map(repr, arguments), *(f"{key}={value!r}" for key, value in named.items())])
        return ANSWERS.get(path, classes[gives]() if gives in classes else None)

    return call


def main(version: str, package: str, builder: str, requests: str) -> None:
    from obsdiff_export.builders.request import Flags, Request

    (surface,) = [surface for surface in surfaces(package) if surface.name == version]
    sys.modules[package] = make(surface, package)
    module, _, name = builder.partition(":")
    made = getattr(importlib.import_module(module), name)()
    told = []
    for data in json.loads(Path(requests).read_text(encoding="utf-8")):
        CALLS.clear()
        fields = {**data, "flags": Flags(**data["flags"])}
        fields |= {key: tuple(data[key]) for key in ("profiles", "targets")}
        plan = made.compile(Request(**fields), lambda severity, message: None)
        told.append({"plan": bytes(plan).decode(), "calls": list(CALLS)})
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
