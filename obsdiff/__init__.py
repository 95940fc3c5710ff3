"""Makes diffusion models small and deployable, without training.

    import obsdiff

    pruned = obsdiff.prune("stabilityai/stable-diffusion-3.5-medium", sparsity="2:4", prompts=["a red circle"])
    obsdiff.save(pruned, "sd35m-24")
    pipe = obsdiff.load("sd35m-24")

The names below are imported when they are first used, so that `import obsdiff` is cheap.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from obsdiff_runtime.version import __version__

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's: large tensors on huge pages, a fifth of the page faults

if TYPE_CHECKING:
    from obsdiff.calibration import calibrate
    from obsdiff.settings import Settings
    from obsdiff.shrinking import shrink
    from obsdiff.verbs import build, convert, evaluate, export, load, lora, plan, prune, save

_HOMES = {
    "Settings": "settings",
    "build": "verbs",
    "calibrate": "calibration",
    "convert": "verbs",
    "evaluate": "verbs",
    "export": "verbs",
    "load": "verbs",
    "lora": "verbs",
    "plan": "verbs",
    "prune": "verbs",
    "save": "verbs",
    "shrink": "shrinking",
}
__all__ = [
    "Settings",
    "__version__",
    "build",
    "calibrate",
    "convert",
    "evaluate",
    "export",
    "load",
    "lora",
    "plan",
    "prune",
    "save",
    "shrink",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"obsdiff.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
