"""Questions to libraries that raise, crash, hang or do not load at all."""

from pathlib import Path

import pytest

from obsdiff_export.asking import ask

SCRIPT = """
import ctypes, os, time

def answer(question):
    if question == "raise":
        raise OSError("libnvinfer.so.11: cannot open shared object file\\nsecond line")
    if question == "crash":
        ctypes.string_at(0)
    if question == "leave":
        print("a last word", flush=True)
        os._exit(3)
    if question == "hang":
        time.sleep(60)
    if question == "odd":
        return {1, 2}
    return {"asked": question, "process": os.getpid()}
"""


@pytest.fixture
def vendor(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "vendor.py").write_text(SCRIPT)
    return {"PYTHONPATH": str(tmp_path)}


def test_one_that_crashes_costs_its_own_answer_only(vendor: dict[str, str]) -> None:
    questions = ["a", "raise", "crash", "b", "leave", "c"]
    outcomes = ask("vendor:answer", questions, timeout_s=30, environment=vendor)
    assert list(outcomes) == questions
    assert [outcomes[name].value["asked"] for name in "abc"] == ["a", "b", "c"]
    assert len({outcomes[name].value["process"] for name in "abc"}) == 3
    failures = {name: outcomes[name].failure for name in ("raise", "crash", "leave")}
    assert failures["raise"] == "OSError: libnvinfer.so.11: cannot open shared object file second line"
    assert failures["crash"] == "it crashed (SIGSEGV)"
    assert failures["leave"] == "it ended with exit code 3: a last word"


def test_it_can_be_left_at_the_first_one_that_ends_the_process(vendor: dict[str, str]) -> None:
    outcomes = ask(
        "vendor:answer", ["a", "raise", "crash", "b"], timeout_s=30, environment=vendor, until_one_ends_it=True
    )
    assert outcomes["a"].value is not None
    assert [outcomes[name].failure for name in ("crash", "b")] == ["it crashed (SIGSEGV)"] * 2


def test_one_that_hangs_is_ended(vendor: dict[str, str]) -> None:
    outcomes = ask("vendor:answer", ["hang", "after"], timeout_s=1.5, environment=vendor)
    assert outcomes["hang"].failure == "no answer within 2 s"
    assert outcomes["after"].value is not None


def test_an_answer_that_is_no_plain_data_is_a_failure_not_a_crash(vendor: dict[str, str]) -> None:
    outcomes = ask("vendor:answer", ["odd", "after"], timeout_s=30, environment=vendor)
    assert "TypeError" in outcomes["odd"].failure
    assert outcomes["after"].value is not None


def test_a_module_that_ends_its_process_is_asked_twice_and_then_given_up(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import os\nopen('loads', 'a').write('x')\nos._exit(1)".replace(
        "'loads'", repr(str(tmp_path / "loads"))))  # fmt: skip
    outcomes = ask("broken:answer", [str(number) for number in range(9)], timeout_s=30,
                   environment={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert {outcome.failure for outcome in outcomes.values()} == {"it ended with exit code 1"}
    assert len((tmp_path / "loads").read_text()) == 2
