"""A convolution of one pixel is a linear over channels: the same product, the same memory, other shapes."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from obsdiff import pointwise

CONVOLUTION = nn.Conv2d(6, 4, 1)


def pixels() -> torch.Tensor:
    return torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0))


def test_it_gives_what_the_linear_of_its_matrix_gives_of_its_tokens() -> None:
    x = pixels()
    linear = functional.linear(pointwise.tokens(CONVOLUTION, x), pointwise.matrix(CONVOLUTION.weight), CONVOLUTION.bias)
    torch.testing.assert_close(linear, pointwise.tokens(CONVOLUTION, CONVOLUTION(x)))
    assert linear.shape == (2, 15, 4)
    assert pointwise.widths(CONVOLUTION) == (6, 4)


def test_its_matrix_is_the_weight_itself_and_is_written_back_in_its_shape() -> None:
    convolution = nn.Conv2d(6, 4, 1)
    matrix = pointwise.matrix(convolution.weight)
    assert matrix.data_ptr() == convolution.weight.data_ptr()
    pointwise.write(convolution.weight, torch.ones(4, 6))
    assert torch.equal(matrix, torch.ones(4, 6))


def test_a_linear_is_looked_at_as_it_is() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(2, 3, 6)
    assert pointwise.matrix(linear.weight) is linear.weight
    assert pointwise.tokens(linear, x) is x
    assert pointwise.widths(linear) == (6, 4)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(6, 4, 1), True),
        (nn.Conv2d(6, 4, 3, padding=1), False),
        (nn.Conv2d(6, 4, 1, stride=2), False),
        (nn.Conv2d(6, 4, 1, groups=2), False),
        (nn.Conv2d(6, 4, 1, padding=1), False),
        (nn.Linear(6, 4), False),
    ],
)
def test_what_reads_neighbours_or_some_channels_is_none(module: nn.Module, expected: bool) -> None:
    assert pointwise.is_pointwise(module) == expected
