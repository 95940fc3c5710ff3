"""The runtime in a process where torch and all that needs it cannot be imported."""

import subprocess
import sys
from pathlib import Path

import pytest

SMOKE = Path(__file__).with_name("torch_free_smoke.py")
BLOCKED = ("torch", "diffusers", "transformers", "onnx", "pydantic", "scipy", "obsdiff", "obsdiff_export")
RUN = f"""
import runpy, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
sys.argv = sys.argv[1:]
script = runpy.run_path(sys.argv[0])
script["samples"]()
script["draws"](sys.argv[1])
loaded = [name for name in {BLOCKED!r} if sys.modules.get(name) is not None]
assert not loaded, loaded
"""


def python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def test_a_bundle_draws_and_is_timed_with_torch_blocked(sd3_bundle: Path) -> None:
    out = python("-c", RUN, str(SMOKE), str(sd3_bundle))
    assert "drew (1, 32, 32, 3)" in out
    assert "Latency, ms" in out


def test_importing_brings_in_the_standard_library_only() -> None:
    code = "import sys, obsdiff_runtime; print([n for n in ('numpy', 'torch', 'tokenizers') if n in sys.modules])"
    assert python("-c", code).strip() == "[]"


@pytest.mark.parametrize("module", ["bundle", "backends", "backends.ort", "schedulers", "timing", "errors"])
def test_modules_import_numpy_and_nothing_else(module: str) -> None:
    code = f"import sys, obsdiff_runtime.{module}; print([n for n in {(*BLOCKED, 'tokenizers', 'onnxruntime', 'PIL')!r}"
    assert python("-c", f"{code} if n in sys.modules])").strip() == "[]"


def test_the_api_is_there_when_it_is_asked_for() -> None:
    code = "import obsdiff_runtime as r; print(callable(r.bench), callable(r.open_bundle), r.Pipeline.__name__, dir(r))"
    assert python("-c", code).startswith("True True Pipeline ['Pipeline', '__version__', 'bench', 'open_bundle']")
