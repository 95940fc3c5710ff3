"""A denoiser of real widths is exported in far less memory than its weights take, and every bit arrives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_few_blocks_of_flux_need_less_memory_than_their_weights(tmp_path: Path) -> None:
    config = json.loads((ROOT / "tests/obsdiff/configs/flux1_dev.json").read_text(encoding="utf-8"))
    small = tmp_path / "few_blocks.json"
    small.write_text(json.dumps(config | {"num_layers": 1, "num_single_layers": 1}), encoding="utf-8")
    command = [sys.executable, "benchmarks/large_export.py", str(small), "--folder", str(tmp_path), "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    equal, total = map(int, re.findall(r"(\d+) of (\d+)", ran.stdout)[0])
    assert equal == total > 30
    checkpoint, peak = re.findall(r"([\d.]+) GB ", ran.stdout)[0], re.findall(r"([\d.]+) GiB", ran.stdout)[0]
    assert float(checkpoint) > 0.95
    assert float(peak) < 0.8, "the libraries alone hold half of it"
