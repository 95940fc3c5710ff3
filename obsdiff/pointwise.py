"""A linear, and a convolution of one pixel, which is one over channels: how both are looked at alike.

weight    (out, in), or (out, in, 1, 1)
tokens    (rows, tokens, channels), or (rows, channels, h, w)
"""

import math
from typing import Final

from torch import Tensor, nn

_ONE: Final = (1, 1)


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a convolution in which a pixel of the output reads all channels of the same pixel, and no more."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == _ONE
        and module.stride == _ONE
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def matrix(weight: Tensor) -> Tensor:
    """The weight as (out, in), in the same memory."""
    return weight.view(len(weight), -1) if weight.ndim > 2 else weight


def weight(denoiser: nn.Module, name: str) -> Tensor:
    """The weight of one of its linears as (out, in), in the same memory."""
    return matrix(denoiser.get_parameter(f"{name}.weight").data)


def bias(denoiser: nn.Module, name: str) -> Tensor | None:
    """The bias of one of its linears, (out,), in the same memory, where it has one."""
    found = denoiser.get_submodule(name).bias
    return found.data if isinstance(found, Tensor) else None


def tokens(module: nn.Module, value: Tensor) -> Tensor:
    """What the module reads or gives, channels last: a pixel is a token."""
    return value.flatten(2).mT if isinstance(module, nn.Conv2d) else value


def nothing(module: nn.Module, value: Tensor) -> Tensor:
    """Zeros in the place of what the module would give."""
    out = widths(module)[1]
    if isinstance(module, nn.Conv2d):
        return value.new_zeros(len(value), out, *value.shape[2:])
    return value.new_zeros(*value.shape[:-1], out)


def write(parameter: Tensor, value: Tensor) -> None:
    """Changes the parameter: `value` is copied into it, where it is a weight as (out, in)."""
    parameter.data.copy_(value.reshape(parameter.shape))


def resize(module: nn.Module) -> None:
    """Changes the numbers that a linear or convolution keeps of its weight, which was cut; others have none."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        rows, columns = module.weight.shape[:2]
        module.groups = rows if module.groups > 1 else 1  # one channel each: no other kind is cut
        module.out_channels, module.in_channels = rows, columns * module.groups


def size_behind(parameter: Tensor) -> int:
    """Numbers of a weight for each of its rows and columns: those of a convolution's kernel."""
    return math.prod(parameter.shape[2:])
