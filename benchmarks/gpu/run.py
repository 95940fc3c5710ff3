"""What this GPU does with what obsdiff makes: one script, a quarter of an hour, a table last.

    python benchmarks/gpu/run.py --out gpu.json
    python benchmarks/gpu/run.py --dry-run          without a GPU: every part on toy shapes on the CPU

Needs this repository (which need not be installed), its dependencies, torch with CUDA, and pytest and hypothesis for
the tests; TensorRT and cuda-python for the engines. Every part runs in a process of its own and has its own time: one
that crashes, hangs or lacks something leaves the rows it has and its error, and the others go on.

    linears     2:4 linears in torch by cuSPARSELt, beside dense ones, at the shapes of SD3-medium, FLUX.1 and SDXL
    solving     the pruner's solve: beside column-by-column OBS, and against its result on the CPU
    pruning     the shipped pipeline pruned here and on the CPU, and a model of SD3-medium's shapes
    denoisers   an SD3 block and SD3-medium: 2:4 and 15 to 30 % smaller, eager, compiled, as CUDA graphs
    offloaded   a model of FLUX.1-dev's shapes pruned in 24 GB of GPU memory
    engines     TensorRT engines with and without the sparse flag, where TensorRT is installed
    checks      the tests that need a GPU
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from gpu.rows import Options, Row, read  # noqa: E402
from gpu.table import table  # noqa: E402

SECONDS = {
    "linears": 90,
    "solving": 60,
    "pruning": 110,
    "denoisers": 190,
    "offloaded": 400,
    "engines": 120,
    "checks": 40,
}
"""Of each part: ten minutes in all."""

MACHINE_SECONDS = 60
"""For asking what is here; it takes one or two."""

QUICK = 0.3
GRACE_SECONDS = 20
"""Beyond its time, in which a part may finish the case it is at."""


def main(
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(SECONDS)}.")] = ",".join(SECONDS),
    out: Annotated[Path, typer.Option(help="Every row and the machine, as JSON.")] = Path("gpu.json"),
    quick: Annotated[bool, typer.Option(help="Fewer cases, three minutes.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Toy shapes on the CPU: tries the benchmark, measures nothing.")
    ] = False,
) -> None:
    names = parts.split(",")
    unknown = [name for name in names if name not in SECONDS]
    if unknown:
        raise typer.BadParameter(f"--parts are {', '.join(SECONDS)}; not {', '.join(unknown)}")
    if not dry_run and not _has_gpu():
        typer.echo(
            "no NVIDIA GPU is visible to torch here; --dry-run tries every part on toy shapes on the CPU", err=True
        )
        raise typer.Exit(1)
    told = {
        name: Options(
            device="cpu" if dry_run else "cuda",
            seconds=SECONDS[name] * (QUICK if quick else 1) if name in SECONDS else MACHINE_SECONDS,
            tiny=dry_run,
            quick=quick,
        )
        for name in ("machine", *names)
    }
    rows = [row for name, options in told.items() for row in _run(name, options)]
    out.write_text(json.dumps({"dry_run": dry_run, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", "utf-8")
    console = Console(width=150)
    if dry_run:
        console.print("a dry run on the CPU: no figure here says anything of a GPU")
    console.print(table(rows))


def _has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def _run(name: str, options: Options) -> Sequence[Row]:
    """The rows of a part, and one for what became of its process if that did not end well."""
    typer.echo(f"{name}: up to {options.seconds:.0f} s", err=True)
    paths = [HERE.parent, REPOSITORY, REPOSITORY / "export", REPOSITORY / "runtime"]
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *inherited])}
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch) / "rows.jsonl", Path(scratch) / "log"
        command = [sys.executable, "-m", "gpu.part", name, str(file), json.dumps(asdict(options))]
        with log.open("wb") as sink:
            try:
                code = subprocess.run(
                    command,
                    env=environment,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=options.seconds + GRACE_SECONDS,
                    check=False,
                ).returncode
                end = "" if code == 0 else f"its process ended with {code}: {_last_line(log)}"
            except subprocess.TimeoutExpired:
                end = f"it was stopped after {options.seconds + GRACE_SECONDS:.0f} s; rows before that count"
        rows = read(file)
    if end and not any(row.error for row in rows if not row.case):
        rows.append(Row(part=name, case={}, error=end))
    return rows


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    typer.run(main)
