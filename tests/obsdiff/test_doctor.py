"""`obsdiff doctor`, the verb."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from obsdiff.cli import main
from obsdiff_export import doctor
from obsdiff_export.asking import Outcome
from obsdiff_export.doctor.examination import examine


def test_a_quick_look_is_one_json_object_and_imports_no_vendors_library(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['obsdiff', 'doctor', '--quick', '--json']\n"
        "from obsdiff.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    code = ended.code\n"
        "heavy = {'torch', 'diffusers', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["ready"]
    assert data["facts"]["libraries"]["torch"]["value"]["version"]
    assert data["facts"]["products"] == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_the_verb_exits_with_5_where_the_main_job_cannot_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here = examine(tmp_path, quick=True)
    absent = Outcome(value=None, failure="ModuleNotFoundError: No module named 'torch'")
    machine = replace(here, unmet=(), libraries={**here.libraries, "torch": absent})
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: machine)
    monkeypatch.setattr("sys.argv", ["obsdiff", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert ended.value.code == 5
    assert err == "obsdiff: `obsdiff export` cannot run here; first mend: torch\n"
    assert "No module named" not in out if not arguments else '"ready": false' in out
