"""`obsdiff-runtime`, the command of devices without torch."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from obsdiff_runtime import cli, flags
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.version import __version__

PROMPT = "a large red circle above a small blue square"
LINE = [sys.executable, "-m", "obsdiff_runtime"]
HEAVY = ("numpy", "torch", "PIL", "tokenizers", "onnxruntime", "typer", "rich", "pydantic", "fastapi", "uvicorn")


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def obsdiff_runtime(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """obsdiff_runtime(*arguments): exit code, stdout and stderr of a call in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.run([str(argument) for argument in arguments])
        except SystemExit as exited:
            code = int(exited.code or 0)
        return code, *capfd.readouterr()

    return call


def test_help_of_every_verb_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom obsdiff_runtime import cli\n"
        f"for line in (['--help'], *([verb, '--help'] for verb in cli.VERBS)):\n"
        "    try:\n        cli.run(line)\n    except SystemExit as exited:\n        assert exited.code == 0\n"
        f"sys.exit(str([name for name in {HEAVY!r} if name in sys.modules] or 0) if "
        f"any(name in sys.modules for name in {HEAVY!r}) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for verb, text in (
        ("generate", "An image from a prompt"),
        ("bench", "Time,"),
        ("serve", "OpenAI's"),
        ("inspect", "What"),
    ):
        assert f"{verb} " in result.stdout
        assert text in result.stdout


def test_version_is_quick() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        result = subprocess.run([*LINE, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout == f"obsdiff-runtime {__version__}\n"
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1  # 0.1 s where nothing else runs


def test_generate_draws_what_the_pipeline_draws(
    obsdiff_runtime: Callable[..., tuple[int, str, str]], sd3_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "picture.png"
    asked = ("--seed", 7, "--steps", 2, "--guidance_scale", 2.5, "--height=24", "--noise", "torch", "--threads", 1)
    code, out, err = obsdiff_runtime("generate", sd3_bundle, PROMPT, "-o", output, *asked)
    assert (code, out) == (0, f"{output}\n")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["text", "denoise", "decode"]
    expected = Pipeline(sd3_bundle, threads=1)(
        PROMPT, seed=7, num_inference_steps=2, guidance_scale=2.5, height=24, noise_source="torch"
    )
    np.testing.assert_array_equal(Image.open(output), expected.arrays[0])


def test_json_is_one_object_and_nothing_else(
    obsdiff_runtime: Callable[..., tuple[int, str, str]], sd3_bundle: Path, tmp_path: Path
) -> None:
    line = ("generate", sd3_bundle, PROMPT, "-o", tmp_path / "a.png", "--steps", 1, "--json")
    code, out, err = obsdiff_runtime(*line)
    assert (code, err) == (0, "")
    assert set(json.loads(out)["seconds"]) == {"text", "denoise", "decode"}
    code, out, err = obsdiff_runtime("bench", sd3_bundle, "--iterations", 1, "--warmup", 0, "--steps", 1, "--json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)["candidates"]) == ["bundle"]


def test_inspect_tells_what_is_in_a_bundle(
    obsdiff_runtime: Callable[..., tuple[int, str, str]], sd3_bundle: Path
) -> None:
    code, out, _ = obsdiff_runtime("inspect", sd3_bundle)
    assert code == 0
    assert "StableDiffusion3Pipeline, dense, by a test" in out
    assert "draws 32 x 32 in 4 steps at guidance 3" in out
    assert "takes hidden_states float (batch, 4, " in out
    told = json.loads(obsdiff_runtime("inspect", sd3_bundle, "--json")[1])
    assert told["defaults"]["width"] == 32
    assert told["components"]["transformer"]["onnx"] == "transformer/model.onnx"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: VERB; obsdiff-runtime --help says what there is"),
        (["drow"], 2, "invalid choice: 'drow'"),
        (["generate", "{bundle}"], 2, "required: PROMPT; obsdiff-runtime generate --help says what there is"),
        (["generate", "{bundle}", "x", "--steps", "two"], 2, "argument --steps: invalid int value: 'two'"),
        (["generate", "{bundle}", "x", "--step", "2"], 2, "unrecognized arguments: --step 2"),
        (["generate", "{bundle}", "x", "--steps", "0"], 2, "num_inference_steps should be at least 1"),
        (["generate", "{bundle}", "x", "-o", "a.docx"], 2, "-o a.docx: no image format of that name"),
        (["generate", "{bundle}", "x", "-o", "folder.png"], 2, "-o folder.png: is a folder; name a file"),
        (["generate", "{bundle}", "x", "--image", "none.png"], 2, "none.png: no image that can be read"),
        (["generate", "{bundle}", "x", "--backend", "onnx"], 2, "no backend 'onnx'"),
        (["generate", "{bundle}", "x", "--noise", "white"], 2, "no noise 'white'"),
        (["generate", "nowhere", "x"], 1, "nowhere is no bundle"),
        (["inspect", "nowhere"], 1, "nowhere is no bundle"),
        (["bench", "{bundle}", "--iterations", "0"], 2, "iterations should be at least 1"),
        (["serve", "{bundle}", "--max-rows", "0"], 2, "--max-rows 0: should be more than 0"),
        (["serve", "{bundle}", "--api-keys", "none"], 2, "none: the API keys cannot be read"),
    ],
)
def test_a_wrong_argument_is_one_line_and_an_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    obsdiff_runtime: Callable[..., tuple[int, str, str]],
    sd3_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    found, out, err = obsdiff_runtime(
        *(str(sd3_bundle) if each == "{bundle}" else each for each in arguments),
    )
    assert (found, out) == (code, "")
    lines = [line for line in err.splitlines() if not line.startswith("text: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("obsdiff-runtime: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 4, "out of memory"),
        (OSError(28, "No space left on device"), 4, "the disk is full"),
        (PermissionError(13, "Permission denied", "a.png"), 1, "a.png: Permission denied"),
        (BrokenPipeError(32, "Broken pipe"), 1, "what read the output has ended"),
    ],
)
def test_what_the_machine_lacks_is_one_line_too(
    error: BaseException,
    code: int,
    sentence: str,
    obsdiff_runtime: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("obsdiff_runtime.verbs.generate", fail)
    found, _, err = obsdiff_runtime("generate", "bundle", "x")
    assert (found, err.count("\n")) == (code, 1)
    assert sentence in err


def test_a_bug_shows_its_traceback(obsdiff_runtime: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsdiff_runtime.verbs.generate", lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError):
        obsdiff_runtime("generate", "bundle", "x")


def test_serve_answers_until_it_is_told_to_stop(sd3_bundle: Path) -> None:
    line = [*LINE, "serve", f"tiny={sd3_bundle}", "--port", "0", "--threads", "1", "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = json.loads(process.stdout.readline())["url"]
            asked = {"prompt": PROMPT, "num_inference_steps": 1}
            answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60)
        finally:
            process.terminate()
    assert answer.status_code == 200
    assert answer.json()["data"][0]["b64_json"]
    assert process.returncode == 0


def test_both_commands_have_the_flags_of_a_verb_from_one_place() -> None:
    import typer.main

    from obsdiff.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb in cli.VERBS:
        ours = {flag.name for flag in cli.VERBS[verb].flags}
        theirs = {option for parameter in commands[verb].params for option in parameter.opts}
        assert ours <= theirs, verb


def test_underscores_are_hyphens_up_to_a_lone_double_hyphen() -> None:
    line = ["--max_rows=a_b", "-o", "x_y", "--", "--max_rows"]
    assert flags.hyphenated(line) == ["--max-rows=a_b", "-o", "x_y", "--", "--max_rows"]
