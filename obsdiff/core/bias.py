"""The bias does its part: grams about the mean, and the bias that makes up for it.

x, mu    a layer's input as it will be, (tokens, in), and its mean, (in,)
y, nu    what the layer should compute, its bias included, (tokens, out), and its mean, (out,)
G, R     E[x x^T], (in, in), and E[y x^T], (out, in)

The best bias of any weight X is nu - X mu. What is then left to minimise is the same problem about the means, with
G - mu mu^T and R - nu mu^T. Its optimum is never above that of the problem with the bias left as it was.
"""

from typing import Final

from torch import Tensor

CONSTANT: Final = 1e-7
"""A channel whose variance is at most this share of its energy is constant: grams are sums of float32 products."""


def centred(gram: Tensor, mean: Tensor) -> Tensor:
    """G - mu mu^T, with the rows and columns of constant channels zero.

    linalg.factorise takes such a channel for dead, so that its weights become zero: the bias carries what they did,
    exactly.

    Args:
        gram: (in, in), float64.
        mean: (in,), float64, under the same token weights.

    Returns:
        (in, in), float64, no negative diagonal.
    """
    found = gram.addr(mean, mean, alpha=-1)
    constant = found.diagonal() <= CONSTANT * gram.diagonal()
    found[constant] = 0
    found[:, constant] = 0
    return found


def centred_cross(right: Tensor, target_mean: Tensor, mean: Tensor) -> Tensor:
    """R - nu mu^T.

    Args:
        right: (out, in), float64.
        target_mean: (out,), float64.
        mean: (in,), float64.

    Returns:
        (out, in), float64.
    """
    return right.addr(target_mean, mean, alpha=-1)


def output_mean(weight: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    """nu of a linear on inputs of this mean: W mu + b.

    Args:
        weight: (out, in), any float dtype.
        bias: (out,), any float dtype.
        mean: (in,), float64.

    Returns:
        (out,), float64.
    """
    return weight.double() @ mean + bias.double()


def best(weight: Tensor, target_mean: Tensor, mean: Tensor) -> Tensor:
    """The bias that gives a pruned linear the mean of its target: nu - X mu.

    With nu = output_mean(W, b, mu) that is b + (W - X) mu.

    Args:
        weight: (out, in), any float dtype: X.
        target_mean: (out,), float64: nu.
        mean: (in,), float64: mu, of the inputs that X will read.

    Returns:
        (out,), float64.
    """
    return target_mean - weight.double() @ mean
