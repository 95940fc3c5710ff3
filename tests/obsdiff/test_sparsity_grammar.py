import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.sparsity import NM, Sparsity, Unstructured, parse
from obsdiff_runtime.errors import ConfigError

ratios = st.floats(min_value=0, max_value=1, exclude_max=True, allow_subnormal=False).map(abs)
patterns = st.one_of(
    st.none(),
    ratios.map(Unstructured),
    st.integers(2, 64).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: NM(n, m))),
)
sparsities = st.builds(Sparsity, heads=ratios, ffn=ratios, pattern=patterns)


@settings(deadline=None, derandomize=True)
@given(sparsities)
def test_what_is_printed_reads_back(sparsity: Sparsity) -> None:
    assert parse(str(sparsity)) == sparsity


@settings(deadline=None, derandomize=True)
@given(ratios)
def test_equal_shares_print_as_structured_and_read_back(ratio: float) -> None:
    sparsity = Sparsity(heads=ratio, ffn=ratio)
    assert str(sparsity).startswith("structured:")
    assert parse(str(sparsity)) == sparsity


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789.:%+ -eadfhnsructu", max_size=20))
def test_any_text_is_a_sparsity_or_a_configuration_error(text: str) -> None:
    try:
        sparsity = parse(text)
    except ConfigError:
        return
    assert parse(str(sparsity)) == sparsity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", Sparsity(pattern=NM(2, 4))),
        ("4:8", Sparsity(pattern=NM(4, 8))),
        ("0.5", Sparsity(pattern=Unstructured(0.5))),
        (".5", Sparsity(pattern=Unstructured(0.5))),
        ("50%", Sparsity(pattern=Unstructured(0.5))),
        ("0", Sparsity(pattern=Unstructured(0.0))),
        ("structured:0.25", Sparsity(heads=0.25, ffn=0.25)),
        ("structured:25%", Sparsity(heads=0.25, ffn=0.25)),
        ("heads:0.2", Sparsity(heads=0.2)),
        ("ffn:0.3", Sparsity(ffn=0.3)),
        ("ffn:0.3+heads:0.2", Sparsity(heads=0.2, ffn=0.3)),
        ("structured:0.2+2:4", Sparsity(heads=0.2, ffn=0.2, pattern=NM(2, 4))),
        (" structured:0.2 + 2:4 ", Sparsity(heads=0.2, ffn=0.2, pattern=NM(2, 4))),
        ("structured:0", Sparsity()),
    ],
)
def test_the_grammar(text: str, expected: Sparsity) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3:2", "N must be 1 to M-1"),
        ("0:4", "N must be 1 to M-1"),
        ("4:4", "N must be 1 to M-1"),
        ("1.5", "not in"),
        ("50", r"did you mean 50%\?"),
        ("", "no ratio"),
        ("abc", "no ratio"),
        ("structured", "no ratio"),
        ("structured:1", "not in"),
        ("heads:2:4", "no ratio"),
        ("2:4+0.5", "two patterns"),
        ("2:4+", "no ratio"),
        ("heads:0.1+heads:0.2", "given twice"),
        ("structured:0.1+ffn:0.2", "given twice"),
        ("-0.5", "no ratio"),
        ("2:x", "no sparsity"),
    ],
)
def test_what_is_no_sparsity_is_a_configuration_error(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(text)


@pytest.mark.parametrize("text", ["100", "100%", "150%", "1"])
def test_no_hint_leads_to_another_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "did you mean" not in str(caught.value)


def test_the_ratio_of_a_pattern() -> None:
    assert NM(2, 4).ratio == 0.5
    assert Sparsity(heads=0.1).structured
    assert not Sparsity(pattern=NM(2, 4)).structured
