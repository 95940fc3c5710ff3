import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.gates import OPERATORS, Gate, parse, require, require_known
from obsdiff_runtime.errors import ConfigError, QualityError

METRICS = st.from_regex(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*", fullmatch=True)
BOUNDS = st.floats(allow_nan=False, allow_infinity=False)
BLANKS = st.text(" \t", max_size=2)


@given(METRICS, st.sampled_from(sorted(OPERATORS)), BOUNDS)
def test_a_written_gate_reads_back_equal(metric: str, operator: str, bound: float) -> None:
    gate = Gate(metric=metric, operator=operator, bound=bound)
    assert parse(str(gate)) == gate


@given(METRICS, st.sampled_from(sorted(OPERATORS)), BOUNDS, BLANKS, BLANKS)
def test_blanks_change_nothing(metric: str, operator: str, bound: float, a: str, b: str) -> None:
    assert parse(f"{a}{metric}{b}{operator}{a}{bound!r}{b}") == parse(f"{metric}{operator}{bound!r}")


@given(st.floats(allow_nan=False), BOUNDS)
def test_a_gate_fails_where_its_comparison_holds(value: float, bound: float) -> None:
    failing = {operator for operator in OPERATORS if Gate(metric="m", operator=operator, bound=bound).fails(value)}
    expected = {">", ">="} if value > bound else {"<", "<="} if value < bound else {">=", "<="}
    assert failing == expected


@given(st.text(max_size=20))
def test_whatever_is_written_is_a_gate_or_a_usage_error(text: str) -> None:
    try:
        gate = parse(text)
    except ConfigError:
        return
    assert gate.metric in text
    assert gate.operator in text
    assert not math.isnan(gate.bound)


@pytest.mark.parametrize(
    "text", ["", "ssim", "ssim>", ">0.5", "ssim=0.5", "ssim==1", "ssim>>1", "ssim>nan", "ssim>inf", "0.5<ssim", "a b>1"]
)
def test_what_is_no_gate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--fail-if .*'velocity_error>0.01'"):
        parse(text)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no metric velocty_error; did you mean velocity_error\?"):
        require_known([parse("velocty_error>0.01")], ["ssim", "velocity_error"])
    with pytest.raises(ConfigError, match="there are ssim, lpips"):
        require_known([parse("quality<1")], ["ssim", "lpips"])
    require_known([parse("ssim<0.9")], ["ssim"])


def test_a_failed_gate_says_metric_value_and_bound() -> None:
    gates = [parse("velocity_error>0.01"), parse("ssim<0.9"), parse("psnr_db<20")]
    with pytest.raises(QualityError, match=r"out: .*velocity_error is 0\.02, which is > 0\.01; ssim is 0\.5") as caught:
        require(gates, {"velocity_error": 0.02, "ssim": 0.5, "psnr_db": math.inf}, of="out")
    assert "psnr" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_gates_that_hold_say_nothing() -> None:
    require([parse("velocity_error>0.01")], {"velocity_error": 0.01}, of="out")


def test_a_gate_on_what_was_not_measured_is_a_usage_error_not_a_pass() -> None:
    for figures in ({"lpips": None}, {}):
        with pytest.raises(ConfigError, match="lpips was not measured for out"):
            require([parse("lpips>0.1")], figures, of="out")
