"""The normal numbers of torch's CPU generator in float32, bit for bit, without torch.

Sixteen and more of them are torch's vector path on x86 with AVX2: 24-bit uniforms from the Mersenne twister, Box-Muller
with the single-precision polynomials of Cephes (Moshier), sums of products rounded once as fused instructions do. Here
every operation is an exact or correctly rounded one of IEEE 754, so that the bits are the same on any machine; torch's
own differ by up to 2.3e-6 where it has other kernels (ARM). Fewer than sixteen are drawn in double precision, one by
one.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]
BLOCK: Final = 16  # drawn together: eight radii from the first half, eight angles from the second
HALF: Final = BLOCK // 2

LOG_SERIES: Final = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2: Final = (np.float32(0.693359375), np.float32(-2.12194440e-4))  # high, low
SINE_SERIES: Final = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COSINE_SERIES: Final = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
QUARTER_PI: Final = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # high to low, exact in float32


class TorchGenerator:
    """torch.Generator() on the CPU after manual_seed(seed).

    torch keeps the lowest 32 bits of a seed: those that differ by a multiple of 2^32 draw the same.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        seeded = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)["state"]
        self._bits.state = {"bit_generator": "MT19937", "state": seeded}
        self._spare: float | None = None

    def rows(self, shape: Sequence[int], start: int, stop: int) -> Singles:
        """torch.randn(shape, generator=self)[start:stop]; computes little more than those rows."""
        size, row = math.prod(shape), math.prod(shape[1:])
        if size < BLOCK:
            values = np.array([self._single() for _ in range(size)], np.float32)[start * row : stop * row]
        else:
            values = self._block_values(size, start * row, stop * row)
        return values.reshape(stop - start, *shape[1:])

    def _block_values(self, size: int, start: int, stop: int) -> Singles:
        """(stop - start,), a part of a draw of `size`. Where that is no whole blocks, the last 16 are drawn again."""
        uniforms = self._uniforms(size)
        whole = size // BLOCK * BLOCK
        first, last = start // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, whole)
        values = box_muller(uniforms[first:last].reshape(-1, 2, HALF)).reshape(-1)
        if whole < size:
            again = box_muller(self._uniforms(BLOCK).reshape(1, 2, HALF)).reshape(-1)
            full = np.zeros(size, np.float32)
            full[first:last] = values
            full[-BLOCK:] = again
            values, first = full, 0
        return values[start - first : stop - first]

    def _uniforms(self, count: int) -> Singles:
        return (self._bits.random_raw(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _single(self) -> float:
        """Box-Muller in double precision; its second value is kept for the next call, whatever is drawn between."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, radius = 2 * math.pi * self._double(), math.sqrt(-2 * math.log1p(-self._double()))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _double(self) -> float:
        high, low = self._bits.random_raw(2).tolist()
        return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def box_muller(uniforms: Singles) -> Singles:
    """Normal from uniform numbers in [0, 1), both (blocks, 2, 8): radii and angles in, cosines and sines out."""
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - uniforms[:, 0]))
    sine, cosine = _sine_cosine(np.float32(2 * math.pi) * uniforms[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1) + np.float32(0)  # no negative zeros


def _log(x: Singles) -> Singles:
    """Of normal numbers in (0, 1]: x = 2^e (1 + m), m from sqrt(1/2) - 1 to sqrt(2) - 1, log(1 + m) as a series."""
    mantissa, exponent = np.frexp(x)  # in [0.5, 1)
    low = mantissa < np.float32(math.sqrt(0.5))
    m = np.where(low, mantissa + mantissa, mantissa) - np.float32(1)
    e = (exponent - low).astype(np.float32)
    square = m * m
    series = _fused(_series(LOG_SERIES, m) * m, square, e * LN2[1]) - np.float32(0.5) * square
    return m + series + e * LN2[0]


def _sine_cosine(x: Singles) -> tuple[Singles, Singles]:
    """Of 0 <= x <= 2 pi: taken to the nearest even octant, where each is one of two series."""
    octant = ((x * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1
    turns = -octant.astype(np.float32)
    for part in QUARTER_PI:
        x = _fused(turns, np.float32(part), x)
    square = x * x
    cosine = _fused(_series(COSINE_SERIES, square) * square, square, np.float32(-0.5) * square) + np.float32(1)
    sine = _fused(_series(SINE_SERIES, square) * square, x, x)
    swapped = (octant & 2) != 0
    sine, cosine = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(octant & 4, -sine, sine), np.where((octant + 2) & 4, -cosine, cosine)


def _series(coefficients: Sequence[float], x: Singles) -> Singles:
    """Horner's rule, the highest power first."""
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = _fused(total, x, np.float32(coefficient))
    return total


def _fused(a: Singles, b: Singles | np.float32, c: Singles | np.float32) -> Singles:
    """a b + c, rounded once.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again to float32 is harmless
    (Boldo & Melquiond 2008, "Emulation of FMA"); what it lost is Knuth's two-sum.
    """
    product = a.astype(np.float64) * b
    addend = np.float64(c) if np.ndim(c) == 0 else np.asarray(c, np.float64)
    total: NDArray[Any] = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    outwards = (lost > 0) == (total > 0)
    odd = np.where((lost != 0) & (bits % 2 == 0), np.where(outwards, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)
