"""Parameters whose values stay in their file: a network that is larger than the memory is exported all the same."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn


class StoredParameter(nn.Parameter):
    """A parameter on the meta device, and where its values are.

    Attributes:
        path: a safetensors file.
        key: the tensor's name in it.
    """

    path: Path
    key: str

    def __new__(cls, like: Tensor, path: Path, key: str) -> "StoredParameter":
        """Of the shape and dtype of `like`."""
        found = super().__new__(cls, torch.empty_like(like, device="meta"), requires_grad=False)
        found.path, found.key = path, key
        return found


def values(parameter: Tensor) -> Tensor:
    """A parameter with its values: itself, or read from its file, which is not kept open."""
    if not isinstance(parameter, StoredParameter):
        return parameter
    with safe_open(parameter.path, framework="pt") as file:
        found: Tensor = file.get_tensor(parameter.key)
    return found


def is_stored(module: nn.Module) -> bool:
    """Whether any of the module's parameters lies in a file."""
    return any(isinstance(parameter, StoredParameter) for parameter in module.parameters())
