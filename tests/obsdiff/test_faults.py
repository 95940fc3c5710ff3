"""Bad input and faults: one clear line on stderr, the documented exit code, nothing half-written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from obsdiff import verbs
from obsdiff.cli import main
from obsdiff_export import resources
from obsdiff_export.builders.rtx import Rtx
from obsdiff_export.builders.tensorrt import TensorRt
from obsdiff_runtime.bundle import Defaults, Manifest, write_manifest

Fails = Callable[..., str]
TINY = (
    "--prompts-file",
    "prompts.txt",
    "--steps",
    "1",
    "--height",
    "32",
    "--width",
    "32",
    "--max-sequence-length",
    "2",
    "--draws",
    "1",
)

needs_rtx = pytest.mark.skipif(bool(Rtx().missing()), reason=f"TensorRT-RTX: {Rtx().missing()}")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a model "sd3" and two prompts."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "sd3").symlink_to(sd3_folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """call(*arguments): exit code, stdout and stderr of the command, run in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["obsdiff", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited, warnings.catch_warnings():
            main()
        out, err = capfd.readouterr()
        return int(exited.value.code or 0), out, err

    return run


@pytest.fixture
def fails(call: Callable[..., tuple[int, str, str]], here: Path) -> Fails:
    """fails(*arguments, code=2): the one line that a call says; nothing new may lie in the folder afterwards."""

    def run(*arguments: str, code: int) -> str:
        before = sorted(here.iterdir())
        got, out, err = call(*arguments, "-q")
        assert got == code, err
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert sorted(here.iterdir()) == before
        return lines[0]

    return run


def prune(*arguments: str, model: str = "sd3", sparsity: str = "2:4", output: str = "out") -> list[str]:
    return ["prune", model, "--sparsity", sparsity, *TINY, "-o", output, *arguments]


def export(*arguments: str) -> list[str]:
    return ["export", "sd3", "--sparsity", "2:4", *TINY, "--eval-prompts", "1", "-o", "out", *arguments]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where weights are loaded: the refusal comes before the work."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the work had begun")

    monkeypatch.setattr(verbs, "load_model", load)


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "sd3", "--against", "sd3", "--html"],
        ["bench", "diffusers:sd3", "--html"],
        ["whatif", "sd3", "--html"],
        ["whatif", "sd3", "--output"],
        ["plan", "sd3", "--sparsity", "2:4", "--save-config"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    arguments: list[str], fails: Fails, no_work: None, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "folder").mkdir()
    flag = arguments[-1]
    assert f"{flag} folder: is a folder; name a file" in fails(*arguments, "folder", code=2)
    assert "prompts.txt is a file; choose another folder" in fails(*arguments, "prompts.txt/page.html", code=2)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    assert f"{flag} new/page.html: may not be written" in fails(*arguments, "new/page.html", code=2)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (prune(model="./nowhere"), "./nowhere: there is no such folder"),
        (prune(model="no-one/nothing"), "is neither a folder here nor a model that can be fetched"),
        (prune(model="~/no-such-folder"), "~/no-such-folder: there is no such folder"),
        (prune(model="prompts.txt"), "is a file; name a diffusers folder"),
        (prune(sparsity="3:2"), "3:2 means 3 zeros in every 2 weights"),
        (prune(sparsity="2:0"), "2:0"),
        (prune(sparsity="much"), "much"),
        (prune(sparsity="1.5"), "1.5"),
        (prune(sparsity="2:4+0.5"), "2:4+0.5"),
        (prune("--include", "none.*"), "--include 'none.*' matches no linear"),
        (prune("--exclude", "*"), "leave no linear to prune"),
        (prune("--blocks", "2-1"), "ends before it starts"),
        (prune("--height", "63"), "--height 63: must be a multiple of 4; near are 60 and 64"),
        (prune("--width", "1"), "--width 1: must be a multiple of 4"),
        (prune("--height", "4096"), "--height 4096: this denoiser draws at most 48 pixels a side"),
        (prune("--guidance-scale", "nan"), "--guidance-scale nan: must be a finite number"),
        (prune("--max-sequence-length", "0"), "--max-sequence-length 0: must be at least 1"),
        (prune("--max-sequence-length", "9999"), "--max-sequence-length 9999: must be at most 512"),
        (prune("--seed", "99999999999999999999"), "--seed 99999999999999999999: must be at most"),
        (prune("--gram-budget", "1.2.3GB"), "--gram-budget 1.2.3GB: expected a size such as 8GiB"),
        (prune("--num-samples", "0"), "--num-samples should be at least 1, not 0"),
        (prune("--steps", "0"), "--steps 0: must be at least 1"),
        (prune("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (prune("--damp", "nan"), "--damp nan: must be positive"),
        (prune("--prompts-file", "none.txt"), "--prompts-file none.txt: No such file"),
        (prune("--prompts-file", "sd3"), "--prompts-file sd3: Is a directory"),
        (prune(output="."), "name the folder to create"),
        (prune(output="prompts.txt/out"), "prompts.txt is a file"),
        (export("--dtype", "fp8"), "--dtype fp8: there are auto, fp32, fp16, bf16"),
        (export("--opset", "5"), "opset 5 has no float32 graphs; take 18 or later"),
        (export("--targets", "8.9"), "--targets is about engines, and none are built"),
        (export("--height", "8"), "are too small to compare"),
        (export("--eval-prompts", "-1"), "--eval-prompts -1: must not be negative"),
        (export("--eval-prompts-file", "none.txt"), "--eval-prompts-file none.txt: No such file"),
    ],
)
def test_bad_input_is_refused_before_the_work(arguments: list[str], message: str, fails: Fails) -> None:
    assert message in fails(*arguments, code=2)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_prompts_that_are_none_are_an_error_and_not_a_zero_model(content: str, fails: Fails, here: Path) -> None:
    (here / "prompts.txt").write_text(content)
    assert "prompts.txt: holds no prompt" in fails(*prune(), code=2)


@pytest.mark.usefixtures("no_work")
def test_a_folder_that_is_no_pipeline_is_an_error(fails: Fails, here: Path) -> None:
    (here / "empty").mkdir()
    assert "neither a diffusers pipeline (model_index.json) nor a denoiser" in fails(*prune(model="empty"), code=2)


@pytest.mark.usefixtures("no_work")
def test_a_denoiser_unknown_to_diffusers_is_an_error_with_the_list(fails: Fails, here: Path, sd3_folder: Path) -> None:
    shutil.copytree(sd3_folder, here / "sana")
    index = here / "sana" / "model_index.json"
    data = {**json.loads(index.read_text()), "transformer": ["diffusers", "SomeTransformer2DModel"]}
    index.write_text(json.dumps({**data, "_class_name": "SanaPipeline"}))
    line = fails(*prune(model="sana"), code=2)
    assert "SomeTransformer2DModel is no denoiser of a known family" in line
    assert "sd3" in line
    assert "unet" in line


@pytest.mark.usefixtures("no_work")
def test_a_text_length_that_the_pipeline_does_not_have_is_an_error(fails: Fails, sd15_folder: Path) -> None:
    assert "this pipeline has no such length" in fails(*prune(model=str(sd15_folder)), code=2)


@pytest.mark.usefixtures("no_work")
def test_an_output_that_exists_is_left_alone(fails: Fails, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "precious").write_text("mine")
    assert "out exists; choose another folder or replace it with --force" in fails(*prune(), code=2)
    assert "out was not written by obsdiff" in fails(*prune("--force"), code=2)
    assert (here / "out" / "precious").read_text() == "mine"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", [prune(), export()])
def test_too_little_disk_is_found_before_the_work(
    command: list[str], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "are free; free some, or choose another disk with -o" in fails(*command, code=4)


def test_a_disk_that_holds_the_denoiser_but_not_the_rest_is_found_before_calibration(
    fails: Fails, sd3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = next((sd3_folder / "transformer").glob("*.safetensors")).stat().st_size
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * denoiser))
    monkeypatch.setattr(verbs.pruning, "prune", lambda *_, **__: pytest.fail("calibration had begun"))
    assert "are free; free some" in fails(*prune(), code=4)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (prune(), "lower --batch-size, --height or --width"),
        (export(), "lower --batch-size, --height or --width"),
        (prune("--method", "obsdiff"), "raise --packages"),
    ],
)
def test_too_little_memory_is_found_before_the_work(
    command: list[str], advice: str, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert f"are available; {advice}" in fails(*command, code=4)


@pytest.mark.usefixtures("no_work")
def test_a_host_need_not_hold_what_its_gpu_does(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(AssertionError, match="the work had begun"):
        fails(*prune("--device", "cuda"), code=4)
    assert "are available" in fails(*prune("--device", "cuda", "--offload"), code=4)


@pytest.mark.usefixtures("no_work")
def test_hidden_states_that_no_disk_holds_count_as_memory(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: SimpleNamespace(available=400 * 10**6))
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    with pytest.raises(AssertionError, match="the work had begun"):
        fails(*prune("--draws", "2000"), code=4)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=50 * 10**6))
    line = fails(*prune("--draws", "2000"), code=4)
    assert "are available; lower --draws, --kept-steps or --num-samples" in line


@pytest.mark.parametrize("where", ["python", "host", "gpu"])
def test_memory_that_runs_out_at_work_names_the_flags_that_count(
    where: str, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        if where == "host":
            torch.empty(10**14)
        raise (
            MemoryError if where == "python" else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        )

    monkeypatch.setattr(verbs, "load_model", full)
    line = fails(*prune(), code=4)
    place = " on the GPU" if where == "gpu" else ""
    assert f"out of memory{place}; lower --batch-size, and --draws or --kept-steps; " in line
    assert "raise --packages" in line
    assert "--offload" in line


def test_memory_that_runs_out_where_nothing_can_be_lowered_names_no_flag(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(verbs, "convert", full)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    line = fails("convert", str(tmp_path / "model.safetensors"), "--base", "x", "-o", str(tmp_path / "out"), code=4)
    assert line.endswith("out of memory; close other programs, or run it where more is free")


@pytest.mark.usefixtures("no_work")
def test_trt_without_a_builder_names_the_extra_before_the_work(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    for builder in (Rtx, TensorRt):
        monkeypatch.setattr(builder, "missing", lambda self: "not installed")
    line = fails(*export("--trt"), code=5)
    assert "obsdiff[rtx]" in line
    assert "obsdiff[trt]" in line


@needs_rtx
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("target", ["9.0", "nonsense"])
def test_a_target_that_cannot_be_built_for_is_found_before_the_work(
    target: str, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRt, "missing", lambda self: "no GPU")
    line = fails(*export("--trt", "--targets", target), code=5)
    assert f"cannot build for compute capability {target}; it knows 7.5" in line


@pytest.mark.parametrize("device", ["cuda:7", "nonsense"])
def test_a_device_that_is_not_there_is_an_error(device: str, fails: Fails) -> None:
    assert f"--device {device}: this torch cannot use it here" in fails(*prune("--device", device), code=2)


def test_weights_that_make_nan_are_an_error_that_says_where(fails: Fails, here: Path, sd3_folder: Path) -> None:
    shutil.copytree(sd3_folder, here / "broken")
    path = here / "broken" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["transformer_blocks.1.attn.to_v.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    line = fails(*prune(model="broken"), code=1)
    assert "step 1, prompts 1 to 2: the denoiser's output is not finite; are its weights?" in line
    line = fails(*prune("--packages", "1", "--method", "obsdiff", model="broken"), code=1)
    assert "transformer_blocks.1.attn.to_" in line
    assert ": step 1, prompts 1 to 2: the activation is not finite" in line


def test_a_truncated_weight_file_is_an_error(fails: Fails, here: Path, sd3_folder: Path) -> None:
    shutil.copytree(sd3_folder, here / "short")
    path = here / "short" / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or altered" in fails(*prune(model="short"), code=2)


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """The system refuses to write more into one file: a disk that fills in mid-write, without a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_in_mid_write_leaves_nothing(fails: Fails) -> None:
    with files_of_at_most(100_000):  # the journal's weights are larger
        line = fails(*prune("--method", "magnitude"), code=4)
    assert "the disk is full" in line
    assert "--resume" not in line  # nothing was finished


def test_a_disk_that_fills_while_saving_keeps_the_journal_only(
    call: Callable[..., tuple[int, str, str]], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "out.partial/x")

    monkeypatch.setattr(verbs.checkpoint, "save_into", save)
    code, out, err = call(*prune("--method", "magnitude"), "-q")
    assert (code, out) == (4, "")
    assert err.count("\n") == 1
    assert "No space left on device" in err
    assert "--resume" in err
    assert sorted(path.name for path in here.iterdir()) == ["out.journal", "prompts.txt", "sd3"]
    monkeypatch.undo()
    os.chdir(here)


@pytest.fixture
def bundle(here: Path) -> Path:
    """A bundle of one file, enough for what is looked at first."""
    folder = here / "bundle"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(100)))
    defaults = Defaults(height=32, width=32, num_inference_steps=1, guidance_scale=1.0)
    manifest = Manifest(
        created_by="obsdiff",
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        sparsity="2:4",
        defaults=defaults,
        components={},
    )
    write_manifest(folder, manifest)
    return folder


USES = [["generate", "bundle", "a red circle", "-o", "a.png"], ["bench", "bundle"]]


@pytest.mark.parametrize("use", USES)
def test_a_truncated_bundle_names_the_file(use: list[str], bundle: Path, fails: Fails) -> None:
    (bundle / "weights.bin").write_bytes(bytes(range(50)))
    assert "weights.bin is truncated: 50 bytes, the manifest says 100" in fails(*use, code=1)


@pytest.mark.parametrize("use", USES)
def test_a_tampered_bundle_names_the_file(use: list[str], bundle: Path, fails: Fails) -> None:
    (bundle / "weights.bin").write_bytes(bytes(100))
    assert "weights.bin was altered after export" in fails(*use, code=1)


@pytest.mark.parametrize("use", [*USES, ["build", "bundle"]])
def test_a_bundle_of_a_newer_schema_is_incompatible(use: list[str], bundle: Path, fails: Fails) -> None:
    data = json.loads((bundle / "obsdiff.json").read_text())
    (bundle / "obsdiff.json").write_text(json.dumps({**data, "schema": 99}))
    if use[0] == "build" and Rtx().missing():
        pytest.skip(Rtx().missing())
    assert "the bundle has schema 99" in fails(*use, code=5)


@pytest.mark.parametrize("use", USES)
def test_a_folder_that_is_no_bundle_says_what_makes_one(use: list[str], here: Path, fails: Fails) -> None:
    (here / "bundle").mkdir()
    assert "bundle is no bundle: it has no obsdiff.json; `obsdiff export` makes one" in fails(*use, code=1)


def test_an_image_format_that_does_not_exist_is_refused(fails: Fails, bundle: Path) -> None:
    assert "no image format of that name" in fails("generate", "bundle", "a dog", "-o", "a.xyz", code=2)


@pytest.mark.parametrize(
    "options",
    [
        ["--num-samples", "1"],
        ["--batch-size", "99"],
        ["--guidance-scale", "1"],
        ["--guidance-scale", "0"],
        ["--packages", "1000"],
        ["-o", "new/folder/out/"],
    ],
)
def test_odd_but_sound_input_works(options: list[str], call: Callable[..., tuple[int, str, str]], here: Path) -> None:
    code, out, err = call(*prune("--include", "*.1.*"), *options, "--json")
    assert code == 0, err
    folder = here / json.loads(out)["folder"]
    assert (folder / "transformer" / "obsdiff.json").is_file()
    assert not list(here.rglob("*.journal")) + list(here.rglob("*.partial"))


def started(here: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A run in a process of its own, after its first block."""
    command = [sys.executable, "-c", "from obsdiff.cli import main; main()", *arguments]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (here / "out.journal" / "block-0.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


SLOW = prune("--steps", "12", "--kept-steps", "4", "--draws", "10")
"""Slow enough to be interrupted after its first block."""


def test_ctrl_c_is_one_line_that_names_resume(here: Path) -> None:
    process = started(here, *SLOW, "-q")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "obsdiff: interrupted; the same command with --resume continues\n")
    assert not (here / "out").exists()


@pytest.mark.slow
def test_a_killed_run_leaves_no_result_and_resumes_to_the_same_bytes(
    here: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    process = started(here, *SLOW, "-q")
    process.kill()
    process.communicate(timeout=60)
    assert not (here / "out").exists()

    line = call(*SLOW, "--damp", "0.02", "--resume", "-q")
    assert line[0] == 2
    assert "was begun with other settings" in line[2]

    assert call(*SLOW, "--resume", "-q")[0] == 0

    def written() -> dict[str, bytes]:
        """All but the card, which has a date."""
        files = [path for path in (here / "out").rglob("*") if path.is_file() and path.name != "README.md"]
        return {path.relative_to(here / "out").as_posix(): path.read_bytes() for path in files}

    resumed = written()
    assert not (here / "out.journal").exists()
    assert call(*SLOW, "--force", "-q")[0] == 0
    assert resumed == written()
