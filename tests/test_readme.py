"""The README says what is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from obsdiff.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_each_set_up_command_is_one_line() -> None:
    for marker in ("main job", "tests"):
        assert block(marker).count("\n") == 1
    assert block("main job").rstrip().endswith("obsdiff export --sparsity 2:4 --trt -o out")


def test_ci_runs_the_readme_s_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- tests -->" in script


def test_verbs_and_flags_that_the_readme_names_exist() -> None:
    command = typer.main.get_command(app)
    verbs = command.commands  # type: ignore[attr-defined]
    assert set(re.findall(r"^\| `(\w+)[ `]", README, flags=re.MULTILINE)) == set(verbs)
    flags = {option for verb in verbs.values() for parameter in verb.params for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"} <= flags


@pytest.mark.slow
def test_the_python_lines_run(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    result = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "shapes-24" / "transformer" / "obsdiff.json").is_file()


def test_the_map_names_what_exists() -> None:
    table = README.split("## The code")[1].split("## Checks")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    for row in rows:
        names = re.findall(r"`([^`]+)`", row)
        first = ROOT / names[0]
        for name in names:
            assert any((place / name).exists() for place in (ROOT, first.parent, first)), name


def test_figures_are_filled_in() -> None:
    assert "MEASURED" not in README
