import numpy as np
import pytest

from obsdiff_runtime.backends.numbers import from_device, storage, to_device


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=4000).astype(np.float32) * 10.0 ** random.integers(-30, 30, 4000).astype(np.float32)
    below = values.view(np.uint32) & np.uint32(0xFFFF0000)
    ties = (below | np.uint32(0x8000)).view(np.float32)
    for array in (values, ties):
        low = (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        high = ((array.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
        under, over = np.abs(array.astype(float) - low), np.abs(high.astype(float) - array)
        even = (low.view(np.uint32) >> 16) % 2 == 0
        nearest = np.where((under < over) | ((under == over) & even), low, high)
        np.testing.assert_array_equal(from_device(to_device(array, "bfloat16"), "bfloat16"), nearest)


def test_bfloat16_keeps_what_is_no_number() -> None:
    payload = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    array = np.concatenate([payload, np.array([np.inf, -np.inf, 0.0, -0.0], np.float32)])
    back = from_device(to_device(array, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(np.isnan(back), np.isnan(array))
    np.testing.assert_array_equal(back[2:], array[2:])
    np.testing.assert_array_equal(np.signbit(back[2:]), np.signbit(array[2:]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"])
def test_small_integers_pass_through_every_format(dtype: str) -> None:
    array = np.array([[0, 1], [1, 0]])
    stored = to_device(array.T, dtype)
    assert stored.dtype == storage(dtype)
    assert stored.flags.c_contiguous
    np.testing.assert_array_equal(from_device(stored, dtype), array.T)
