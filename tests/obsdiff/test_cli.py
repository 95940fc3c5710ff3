"""The command line as its users meet it: in a process of its own."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obsdiff import command
from obsdiff.cli import main
from obsdiff_runtime.version import __version__

VERBS = (
    "export",
    "prune",
    "lora",
    "plan",
    "build",
    "whatif",
    "eval",
    "bench",
    "generate",
    "serve",
    "triton",
    "doctor",
    "inspect",
)


def obsdiff(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-c", "from obsdiff.cli import main; main()", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=250, check=False)


def test_help_is_quick_and_lists_every_verb() -> None:
    started = time.process_time()
    result = obsdiff("--help")
    assert result.returncode == 0
    for verb in VERBS:
        assert verb in result.stdout
    assert "Exit codes: 0 done; 1 failed" in " ".join(result.stdout.split())
    assert time.process_time() - started < 5


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_no_torch(verb: str) -> None:
    code = (
        f"import sys; sys.argv = ['obsdiff', '{verb}', '--help']\n"
        "from obsdiff.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_version() -> None:
    assert obsdiff("--version").stdout.strip() == f"obsdiff {__version__}"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """planned(*arguments): what the call `obsdiff plan ... --json`, made in this process, prints."""

    def call(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["obsdiff", "plan", *arguments, "--json"])
        with pytest.raises(SystemExit) as exited, warnings.catch_warnings():
            main()
        assert not exited.value.code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


@pytest.fixture
def failure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """failure(*arguments, code=2): what a call, made in this process and in an empty folder, says as it fails."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["obsdiff", *arguments])
        with pytest.raises(SystemExit) as exited, warnings.catch_warnings():
            main()
        out, err = capfd.readouterr()
        assert exited.value.code == code, err
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "3:2"], "3:2 means 3 zeros in every 2 weights"),
        (["--sparsity", "half"], "'half' is no ratio"),
        (["--sparsity", "50"], "did you mean 50%?"),
        (["--sparsity", "2:4", "--method", "wandaa"], "did you mean wanda?"),
        (["--sparsity", "2:4", "--include", "nothing.*"], "--include 'nothing.*' matches no linear"),
        (["--sparsity", "2:4", "--blocks", "90"], "the denoiser has blocks 0 to"),
        (["--sparsity", "2:4", "--prompts-file", "none.txt"], "--prompts-file none.txt: No such file"),
        (["--sparsity", "2:4", "--num-samples", "0"], "--num-samples should be at least 1, not 0"),
        (["--sparsity", "2:4", "--config", "none.toml"], "--config none.toml: No such file"),
        (["--sparsity", "2:4", "--set", "stepz=3"], "did you mean steps?"),
        ([], "--sparsity is missing"),
        (["no/such/folder", "--sparsity", "2:4"], "no/such/folder"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, failure: Callable[..., str]
) -> None:
    assert message in failure("plan", *arguments, code=2)


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path, failure: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    line = failure("prune", "--sparsity", "2:4", "-o", str(tmp_path / "out"), code=2)
    assert "--force" in line
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_plan_prints_one_json_object_on_stdout() -> None:
    result = obsdiff("plan", "--sparsity", "2:4", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sparsity"] == "2:4"
    assert result.stderr == ""


def test_underscores_in_flags_are_accepted(planned: Callable[..., dict[str, Any]]) -> None:
    assert planned("--sparsity", "2:4", "--max_sequence_length=1")["sparsity"] == "2:4"


def test_settings_saved_from_flags_replay_the_run(planned: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = str(tmp_path / "run.toml")
    first = planned("--sparsity", "ffn:0.5", "--steps", "3", "--save-config", config)
    again = planned("--config", config)
    for plan in (first, again):
        del plan["estimates"]  # from this machine's speed, measured anew each time
    assert first == again


def test_an_interruption_that_was_swallowed_is_heard_at_the_next_step() -> None:
    told: list[int] = []
    with command._heeded(lambda stage, done, total, note="": told.append(done)) as progress:
        progress("prune", 1, 3)
        with contextlib.suppress(KeyboardInterrupt):  # as a finalizer does
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress("prune", 2, 3)
    assert told == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
