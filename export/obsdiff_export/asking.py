"""Questions that may crash or hang, each answered in a process of its own: a broken library is an answer, not an end.

Several questions share a process until one ends it; the others are then asked again in a fresh one.
"""

import json
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff_export import children

_TAIL_CHARACTERS: Final = 300
_GIVE_UP_AFTER: Final = 2
"""Processes in a row that answered nothing: the library itself does not load, and waiting again would not help."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one question.

    Attributes:
        value: what was answered, plain JSON; None where nothing was.
        failure: why, in one line; "" where there is a value.
    """

    value: Any
    failure: str


def ask(
    place: str,
    questions: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    until_one_ends_it: bool = False,
) -> dict[str, Outcome]:
    """Calls a function with each question.

    Args:
        place: the function, "module:name"; it takes one question and gives plain JSON, or raises.
        questions: asked in this order.
        timeout_s: of one process, so at most that of one question.
        environment: variables that the process gets besides this one's.
        until_one_ends_it: ask no others after a question that ended its process; they fail as it does.

    Returns:
        An outcome for each question, in their order.
    """
    outcomes: dict[str, Outcome] = {}
    silent = 0
    left = list(questions)
    while left:
        answered, ended = _in_a_process(place, left, timeout_s, environment or {})
        silent = 0 if answered else silent + 1
        outcomes.update(answered)
        left = [question for question in left if question not in outcomes]
        lost = left if until_one_ends_it or silent == _GIVE_UP_AFTER else left[:1]
        outcomes.update({question: Outcome(value=None, failure=ended) for question in lost})
        left = left[len(lost) :]
    return {question: outcomes[question] for question in questions}


def _in_a_process(
    place: str, questions: Sequence[str], timeout_s: float, environment: Mapping[str, str]
) -> tuple[dict[str, Outcome], str]:
    """What a process answered, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="obsdiff-asking-") as folder:
        answers, said = Path(folder, "answers"), Path(folder, "said")
        command = children.command("obsdiff_export.answering", place, str(answers), *questions)
        with said.open("wb") as sink:
            try:
                code: int | None = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env=children.environment(environment),
                    timeout=timeout_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        words = " ".join(said.read_text(encoding="utf-8", errors="replace").split())[-_TAIL_CHARACTERS:]
        return _read(answers), _ending(code, timeout_s, words)


def _ending(code: int | None, timeout_s: float, words: str) -> str:
    if code is None:
        return f"no answer within {timeout_s:.0f} s"
    how = f"it crashed ({signal.Signals(-code).name})" if code < 0 else f"it ended with exit code {code}"
    return f"{how}: {words}" if words else how


def _read(answers: Path) -> dict[str, Outcome]:
    if not answers.exists():
        return {}
    outcomes = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        try:
            data = json.loads(line)
        except json.JSONDecodeError:  # the line that it was writing when it ended
            break
        outcomes[data["question"]] = Outcome(value=data["value"], failure=data["failure"])
    return outcomes
