"""The second pipeline trains from nothing, loads as plain diffusers and as obsdiff's, and its pictures can be read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from obsdiff.loading import load_pipeline

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CAPTION = re.compile(r"a [a-z ]+ (on the (left|right) and a [a-z ]+ on the (left|right)|in the middle)")


def run(script: str, *words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *words]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "digits"
    run("digits.py", "--out", str(out), "--smoke")
    return out


def test_smoke_training_leaves_a_pipeline_that_generates(trained: Path) -> None:
    assert [path.name for path in trained.parent.iterdir()] == ["digits"], "the work folder stays behind"
    defaults = json.loads((trained / "obsdiff_defaults.json").read_text())
    pipe = StableDiffusionPipeline.from_pretrained(trained)
    image = pipe("a bright red three in the middle", **defaults | {"num_inference_steps": 2}).images[0]
    assert image.size == (48, 24)
    assert pipe.scheduler.config.prediction_type == "epsilon"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    run("digits.py", "--out", str(tmp_path / "again"), "--smoke")
    files = sorted(path.relative_to(trained) for path in trained.rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (trained / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_most_of_the_unet_can_be_pruned(trained: Path) -> None:
    loaded = load_pipeline(trained)
    assert loaded.family.name == "unet"
    assert (loaded.defaults.height, loaded.defaults.width) == (24, 48)
    prunable = sum(loaded.denoiser.get_submodule(x.name).weight.numel() for x in loaded.family.linears(loaded.denoiser))
    assert prunable > 0.5 * sum(weight.numel() for weight in loaded.denoiser.parameters())


def test_calibration_and_evaluation_share_no_prompt(trained: Path) -> None:
    calibration, evaluation = (
        (trained / f"{split}_prompts.txt").read_text().splitlines() for split in ("calibration", "evaluation")
    )
    assert (len(set(calibration)), len(set(evaluation))) == (64, 96)
    assert not set(calibration) & set(evaluation)
    assert all(CAPTION.fullmatch(prompt) for prompt in calibration + evaluation)


def test_the_check_reads_what_the_pen_writes_and_refuses_an_untrained_pipeline(trained: Path, tmp_path: Path) -> None:
    table = run("digits_check.py", str(trained), "--prompts", "10", "--grid", str(tmp_path / "grid.png")).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert (tmp_path / "grid.png").stat().st_size > 0
    assert rows[2] == ["pictures", "digit", "colour", "shade", "nothing else", "all", "95 %"]
    assert int(rows[4][5]) <= 20, "generated"
    assert int(rows[5][5]) >= 80, "drawn by the pen itself"
