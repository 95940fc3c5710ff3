"""The tests that need a GPU: run where there is one, counted either way."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu.rows import Options, Sheet

REPOSITORY = Path(__file__).resolve().parents[2]


def run(sheet: Sheet, options: Options) -> None:
    marked = [path for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    with sheet.case(files=len(marked)) as row, tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        ran = subprocess.run(
            [*command, *map(str, marked)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=max(sheet.left(), 1),
            check=False,
        )
        if not report.exists():
            raise RuntimeError(f"pytest ended with {ran.returncode} and no report: {(ran.stderr or ran.stdout)[-300:]}")
        row.figures |= count(report)
        failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        row.note = "; ".join(failed)


def count(report: Path) -> dict[str, float]:
    """Of a JUnit report: passed, failed (errors among them) and skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    numbers = (
        {} if suite is None else {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    )
    failed = numbers.get("failures", 0) + numbers.get("errors", 0)
    skipped = numbers.get("skipped", 0)
    return {"passed": numbers.get("tests", 0) - failed - skipped, "failed": failed, "skipped": skipped}
