"""A finding of the doctor."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "problem", "not here"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        group: heading that it stands under.
        name: of the thing.
        status: "warn": works, but not as well as it could; "problem": something that is installed or asked for does not
            work; "not here": absent, which is no fault.
        finding: one sentence.
        advice: what to do; "" where there is nothing.
        blocks: `obsdiff export` cannot run like this.
    """

    group: str
    name: str
    status: Status
    finding: str
    advice: str = ""
    blocks: bool = False


def major(version: str) -> int:
    """13 of "13.0"."""
    return int(version.split(".")[0])
