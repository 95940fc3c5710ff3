"""Eight bits against ml_dtypes and float64, and the GPUs that compute with them."""

import ml_dtypes
import numpy as np
import pytest
import torch

from obsdiff_export.capabilities import can_compute, targets_for
from obsdiff_export.formats import FORMATS, FP8, INT8, SMALLEST_SCALE, stored_scale
from obsdiff_runtime.errors import CompatibilityError

USUAL = ("8.6", "8.9", "12.0")


def values() -> torch.Tensor:
    spread = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 4000)
    return torch.cat([spread, torch.tensor([0.0, -0.0, 1e9, -1e9])])


def test_int8_codes_are_those_of_float64():
    scale = 0.03125  # a power of two, so that halves are halves in any precision
    x = torch.cat([values(), torch.arange(-140, 140) * scale / 2])
    wanted = np.clip(np.rint(x.double().numpy() / scale), -128, 127)
    assert np.array_equal(INT8.encode(x, torch.tensor(scale)).numpy(), wanted)


def test_fp8_codes_are_those_of_ml_dtypes_and_saturate():
    scale = 0.5
    wanted = np.clip(values().numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    found = FP8.encode(values(), torch.tensor(scale)).view(torch.uint8).numpy()
    assert np.array_equal(found, wanted.view(np.uint8))


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_rounded_once_stays_the_same_in_the_graphs_dtype(format, dtype):
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 0.02
    scale = stored_scale(weight.abs().amax(1) / format.largest, dtype)[:, None]
    codes = format.encode(weight, scale)
    stored = format.rounded(weight, scale).to(dtype)
    assert torch.equal(format.encode(stored, scale).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda each: each.name)
def test_zeros_stay_zeros_and_nothing_else_about_them_matters(format):
    for scale in (SMALLEST_SCALE, 1.0, 1e4):
        assert not format.encode(torch.tensor([0.0, -0.0]), torch.tensor(scale)).float().any()


def test_a_row_of_zeros_has_the_scale_one():
    assert stored_scale(torch.tensor([0.0, 0.5]), torch.float16).tolist() == [1.0, 0.5]


def test_scales_below_what_float16_keeps_are_raised():
    assert stored_scale(torch.tensor(1e-12), torch.float16) == SMALLEST_SCALE


def test_fp8_leaves_out_the_usual_targets_that_lack_it():
    assert targets_for((), USUAL, ["fp8"]) == ("8.9", "12.0")
    assert targets_for((), USUAL, ["int8", "bf16"]) == USUAL
    assert targets_for(("7.5",), USUAL, ["int8"]) == ("7.5",)


@pytest.mark.parametrize(("asked", "usual"), [(("8.6", "8.9"), USUAL), ((), ("8.0",)), ((), ("8.0", "8.6"))])
def test_fp8_where_there_is_none_is_refused(asked, usual):
    with pytest.raises(CompatibilityError, match=r"compute capability 8\.[06].* has no fp8: that needs 8\.9.*int8"):
        targets_for(asked, usual, ["fp8"])


def test_of_targets_that_are_no_capability_nothing_is_known():
    assert can_compute("cpu", "fp8")
