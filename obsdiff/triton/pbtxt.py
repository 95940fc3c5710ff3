"""Protobuf's text format, as far as a config.pbtxt needs it; the package that knows the schema is no dependency."""

import json
from collections.abc import Mapping, Sequence
from typing import Final, Union

Value = Union[str, int, bool, "Enum", "Message"]
Message = Mapping[str, Value | Sequence[Value]]
"""Field -> value, or the values of a repeated one."""

INDENT: Final = "  "


class Enum(str):
    """The name of an enum's value, which is written without quotes."""

    __slots__ = ()


def render(message: Message, depth: int = 0) -> str:
    """A message, one field a line."""
    lines = []
    for field, given in message.items():
        values = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        for value in values:
            if isinstance(value, Mapping):
                lines.append(f"{INDENT * depth}{field} {{\n{render(value, depth + 1)}{INDENT * depth}}}\n")
            else:
                lines.append(f"{INDENT * depth}{field}: {_scalar(value)}\n")
    return "".join(lines)


def parameters(values: Mapping[str, object]) -> list[Message]:
    """A map of ModelParameters."""
    return [{"key": key, "value": {"string_value": str(value)}} for key, value in values.items()]


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum | int):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
