"""How a module of ours is run in a process of its own."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import obsdiff_export
import obsdiff_runtime.errors

_START: Final = """
import runpy, sys
sys.path[:] = filter(None, sys.path)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""Without the current directory on the path, where a file may be called as a package is; Python 3.10 has no `-P`."""


def command(module: str, *arguments: str) -> list[str]:
    """What starts it: `python -u -m module arguments...`, which sees nothing of the current directory."""
    return [sys.executable, "-u", "-c", _START, module, *arguments]


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's and more, with our packages on the path however they were found."""
    roots = [str(Path(module.__file__ or "").parent.parent) for module in (obsdiff_export, obsdiff_runtime.errors)]
    inherited = [path for path in (more.get("PYTHONPATH"), os.environ.get("PYTHONPATH")) if path]
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join([*roots, *inherited])}
