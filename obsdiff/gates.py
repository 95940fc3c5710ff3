"""Quality gates: `velocity_error>0.01` fails a run whose velocity error is above 0.01.

gate      metric operator bound, blanks allowed between them
metric    a figure of the evaluation: a key of its JSON, inner keys after a dot (pruned_obedience.share)
operator  > >= < <=
bound     a decimal number
"""

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from obsdiff_runtime.errors import ConfigError, QualityError

OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE: Final = re.compile(
    r"\s*(?P<metric>[A-Za-z_][\w.-]*)\s*(?P<operator>[<>]=?)\s*(?P<bound>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*",
    flags=re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What makes a run fail: its metric on that side of the bound."""

    metric: str
    operator: str
    bound: float

    def fails(self, value: float) -> bool:
        """Whether a run of this value fails."""
        return OPERATORS[self.operator](value, self.bound)

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.bound!r}"


def parse(text: str) -> Gate:
    """The gate that a text writes.

    Raises:
        ConfigError: it is no gate.
    """
    match = _GATE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--fail-if {text!r}: expected a metric, one of > >= < <= and a number: 'velocity_error>0.01'"
        )
    return Gate(metric=match["metric"], operator=match["operator"], bound=float(match["bound"]))


def require_known(gates: Iterable[Gate], metrics: Sequence[str]) -> None:
    """Raises ConfigError for a gate on a metric that is none of these, naming the nearest; asked before the work."""
    for gate in gates:
        if gate.metric not in metrics:
            near = difflib.get_close_matches(gate.metric, metrics, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(metrics)}"
            raise ConfigError(f"--fail-if {gate}: no metric {gate.metric}; {hint}")


def require(gates: Sequence[Gate], figures: Mapping[str, float | None], *, of: str) -> None:
    """Holds a run to its gates.

    Args:
        gates: all of them must not fail.
        figures: measured values by metric; None where one was not measured.
        of: whose figures these are, for the message.

    Raises:
        ConfigError: a gate is on something that was not measured.
        QualityError: gates fail; names each with its value and bound.
    """
    failed = []
    for gate in gates:
        value = figures.get(gate.metric)
        if value is None:
            raise ConfigError(f"--fail-if {gate}: {gate.metric} was not measured for {of}")
        if gate.fails(value):
            failed.append(f"{gate.metric} is {value:.6g}, which is {gate.operator} {gate.bound:.6g}")
    if failed:
        raise QualityError(f"{of}: quality gate not met: {'; '.join(failed)}")
