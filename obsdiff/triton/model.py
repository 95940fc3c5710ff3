"""Takes prompts and gives images, by calling the models beside this one. Written by `obsdiff triton`.

Triton's Python needs `pip install obsdiff-runtime`; it needs no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from obsdiff_runtime.triton import Orchestrator


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self._orchestrator = Orchestrator.open(args, pb_utils)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return self._orchestrator.execute(requests)
