"""Runs obsdiff bundles: standard library and numpy, no torch.

`Pipeline("bundle")("a red circle", seed=1)` draws; the names below are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from obsdiff_runtime.version import __version__

if TYPE_CHECKING:
    from obsdiff_runtime.benchmark import bench
    from obsdiff_runtime.bundle import open_bundle
    from obsdiff_runtime.pipeline import Pipeline

__all__ = ["Pipeline", "__version__", "bench", "open_bundle"]

_HOMES = {"Pipeline": "pipeline", "bench": "benchmark", "open_bundle": "bundle"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"obsdiff_runtime.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
