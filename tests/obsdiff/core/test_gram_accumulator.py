import pytest
import torch

from obsdiff.core.gram import GramAccumulator, full_precision
from obsdiff_runtime.errors import CalibrationError


def test_gram_is_the_weighted_mean_of_outer_products() -> None:
    torch.manual_seed(0)
    calls = [(torch.randn(n, 6, dtype=torch.float64) + 1, a) for n, a in ((5, 1.2), (9, 1.0), (1, 0.8))]
    accumulator = GramAccumulator(6)
    for x, a in calls:
        accumulator.add(x, a)
    gram = accumulator.gram()
    total = sum(a * len(x) for x, a in calls)
    torch.testing.assert_close(gram.matrix, sum(a * x.T @ x for x, a in calls) / total, rtol=1e-12, atol=0)
    torch.testing.assert_close(gram.mean, sum(a * x.sum(0) for x, a in calls) / total, rtol=1e-12, atol=0)
    assert gram.tokens == 15
    assert gram.matrix.dtype == gram.mean.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_lose_nothing_beyond_their_own_rounding(dtype: torch.dtype) -> None:
    """The oracle is float64 on the same rounded values; one float32 product of 500 tokens is good to 1e-6."""
    torch.manual_seed(0)
    accumulator, exact = GramAccumulator(8), torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(20):
        x = (100 * torch.randn(500, 8)).to(dtype)
        accumulator.add(x)
        exact += x.double().T @ x.double()
    found = accumulator.gram().matrix
    assert float((found - exact / 10_000).norm() / found.norm()) < 1e-6


def test_float16_inputs_whose_squares_overflow_float16_are_fine() -> None:
    accumulator = GramAccumulator(2)
    accumulator.add(torch.full((3, 2), 6e4, dtype=torch.float16))
    assert float(accumulator.gram().matrix[0, 0]) == pytest.approx(float(torch.tensor(6e4).half()) ** 2)


@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "1 NaN"), (float("inf"), "1 infinite"), (1e30, "too large")]
)
def test_a_non_finite_activation_is_an_error_and_counts_nothing(value: float, says: str) -> None:
    accumulator = GramAccumulator(3)
    accumulator.add(torch.ones(2, 3))
    broken = torch.ones(4, 3)
    broken[1, 2] = value
    with pytest.raises(CalibrationError, match=says):
        accumulator.add(broken)
    gram = accumulator.gram()
    assert gram.tokens == 2
    assert torch.equal(gram.matrix, torch.ones(3, 3, dtype=torch.float64))


def test_a_layer_that_saw_no_token_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no token"):
        GramAccumulator(3).gram()
    empty = GramAccumulator(3)
    empty.add(torch.ones(0, 3))
    with pytest.raises(CalibrationError, match="no token"):
        empty.gram()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_is_restored(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(RuntimeError), full_precision():
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
