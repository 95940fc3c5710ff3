"""The first example runs from nothing and leaves a pipeline that plain diffusers loads and runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "01_train_shapes" / "train.py"


@pytest.mark.slow
def test_smoke_training_leaves_a_pipeline_that_generates(tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--smoke", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"], "the work folder stays behind"
    assert sum(p.stat().st_size for p in out.rglob("*.safetensors")) < 12_000_000
    defaults = json.loads((out / "obsdiff_defaults.json").read_text())
    pipe = StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.tokenizer.tokenize("a red circle") == ["a</w>", "red</w>", "circle</w>"]
    image = pipe(
        "a red circle",
        height=defaults["height"],
        width=defaults["width"],
        num_inference_steps=2,
        guidance_scale=defaults["guidance_scale"],
        max_sequence_length=defaults["max_sequence_length"],
    ).images[0]
    assert image.size == (64, 64)
