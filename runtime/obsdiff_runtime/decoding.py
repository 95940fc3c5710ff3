"""JSON to frozen dataclasses and back, checked against the type hints.

Enough for a manifest: str, int, float, bool, object, Literal of strings, `X | None`, tuple[X, ...], Mapping[str, X],
dataclasses of them.
Every complaint names the field by its path, as in `components.transformer.engines[0].key`.
"""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from obsdiff_runtime.errors import BundleError

T = TypeVar("T")


def decode(kind: type[T], data: object, *, source: str) -> T:
    """A dataclass from parsed JSON; `source` names the file in messages.

    Raises:
        BundleError: a field is missing, unknown or of the wrong type.
    """
    value: T = _decode(kind, data, "", source)
    return value


def encode(value: object) -> Any:
    """Parsed JSON from a dataclass: mappings become dicts, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def _decode(kind: Any, data: object, where: str, source: str) -> Any:
    origin, parameters = get_origin(kind), get_args(kind)
    if kind is object:
        return data
    if origin is Literal:
        if type(data) is not str or data not in parameters:
            raise BundleError(f"{source}: {where} should be one of {', '.join(parameters)}, not {data!r:.40}")
        return data
    if origin in (Union, types.UnionType):
        return _decode_union(parameters, data, where, source)
    if origin is tuple:
        items = _expect(list, data, where, source)
        return tuple(_decode(parameters[0], item, f"{where}[{index}]", source) for index, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        entries = _expect(dict, data, where, source)
        return {key: _decode(parameters[1], item, _join(where, key), source) for key, item in entries.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, _expect(dict, data, where, source), where, source)
    return _decode_scalar(kind, data, where, source)


def _decode_union(kinds: tuple[Any, ...], data: object, where: str, source: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    scalars = [kind for kind in kinds if kind is not type(None)]
    if len(scalars) == 1:
        return _decode(scalars[0], data, where, source)
    for kind in scalars:
        if type(data) is kind:
            return data
    expected = " or ".join(kind.__name__ for kind in scalars)
    raise BundleError(f"{source}: {where or 'the file'} should be {expected}, not {type(data).__name__}")


def _decode_scalar(kind: Any, data: object, where: str, source: str) -> Any:
    if kind is float and type(data) is int:
        return float(data)
    value = _expect(kind, data, where, source)
    if kind is float and not math.isfinite(value):
        raise BundleError(f"{source}: {where} is not a finite number")
    return value


def _decode_dataclass(kind: Any, data: dict[str, object], where: str, source: str) -> Any:
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(data.keys() - fields.keys())
    if unknown:
        raise BundleError(f"{source}: unknown field {_join(where, unknown[0])}; known are {', '.join(fields)}")
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], _join(where, name), source)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BundleError(f"{source}: field {_join(where, name)} is missing")
    return kind(**values)


def _expect(kind: type[T], data: object, where: str, source: str) -> T:
    if type(data) is not kind:  # isinstance would take true for 1
        raise BundleError(
            f"{source}: {where or 'the file'} should be {_JSON_NAMES[kind]}, not {_JSON_NAMES.get(type(data), 'null')}"
        )
    return data


_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
