import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff_export.ports import Port
from obsdiff_export.profiles import profiles_for
from obsdiff_export.requested import Served, ShapeBounds, SizeProfile, parse_profiles, parse_shapes, tables
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.shapes import Range, choose

LATENTS = Port(name="hidden_states", dtype="float16", shape=("batch", 16, "height", "width"))
TIMESTEP = Port(name="timestep", dtype="float", shape=("batch",))
INPUTS = (LATENTS, TIMESTEP)
SERVED = Served(
    sizes={"batch": (1, 2, 8), "height": 64, "width": 64, "image_height": 512, "image_width": 512, "text_tokens": 333},
    rows=2,
    scale=8,
    step=16,
    largest=1536,
)


def only(text: str) -> SizeProfile:
    (found,) = parse_profiles([text])
    return found


def test_a_size_is_square_or_width_by_height_or_a_range():
    assert only("512") == SizeProfile(smallest=(512, 512), largest=(512, 512), images=(1, 4))
    assert only("768x512@4") == SizeProfile(smallest=(768, 512), largest=(768, 512), images=(4, 4))
    assert only("512-1024x768@1-2") == SizeProfile(smallest=(512, 512), largest=(1024, 768), images=(1, 2))


def test_several_are_joined_by_commas_or_repeated_and_equal_ones_are_one():
    assert parse_profiles(["512,768x512", "1024@1-4", "512"]) == (only("512"), only("768x512"), only("1024@1-4"))


@pytest.mark.parametrize("text", ["", "512,", "x512", "512x", "512@", "512@1-", "512@1-2-3", "-512", "1e3", "512X512"])
def test_what_is_no_profile_is_told_what_one_is(text):
    with pytest.raises(ConfigError, match="expected a size in pixels such as 512"):
        parse_profiles([text])


@pytest.mark.parametrize("text", ["0", "512x0", "512@0", "512@0-4"])
def test_nothing_is_zero(text):
    with pytest.raises(ConfigError, match="1 or more"):
        parse_profiles([text])


@pytest.mark.parametrize("text", ["1024-512", "512x768-1024x512", "512@4-1"])
def test_a_range_goes_upwards(text):
    with pytest.raises(ConfigError, match="from its smaller to its larger end"):
        parse_profiles([text])


def test_the_best_shape_is_the_served_one_where_the_profile_holds_it_else_the_largest():
    inside, beyond = tables([only("256-1024"), only("768-1024")], SERVED, denoiser=True)
    assert (inside["height"], beyond["height"]) == ((32, 64, 128), (96, 128, 128))
    assert inside["image_height"] == (256, 512, 1024)
    assert inside["text_tokens"] == 333


def test_the_denoiser_takes_two_rows_an_image_under_guidance_and_one_without():
    (table,) = tables([only("512@1-4")], SERVED, denoiser=True)
    assert table["batch"] == (1, 2, 8)
    (table,) = tables([only("512@3")], SERVED, denoiser=True)
    assert table["batch"] == (3, 6, 6)


def test_the_other_networks_are_timed_at_the_one_image_they_are_given():
    (table,) = tables([only("512@3-4")], SERVED, denoiser=False)
    assert table["batch"] == (1, 1, 4)


def test_a_size_that_the_model_cannot_draw_is_refused():
    with pytest.raises(ConfigError, match="width 520 is no multiple of 16; near are 512 and 528"):
        tables([only("520x512")], SERVED, denoiser=True)
    with pytest.raises(ConfigError, match="at most 1536 pixels a side, not 2048"):
        tables([only("512-2048")], SERVED, denoiser=True)


def test_shapes_in_trtexecs_spelling():
    assert parse_shapes("--min-shapes", "hidden_states:1x16x64x64, input:0:2") == {
        "hidden_states": (1, 16, 64, 64),
        "input:0": (2,),
    }
    assert parse_shapes("--min-shapes", None) == {}


@pytest.mark.parametrize("text", ["", "x", "x:", "x:1xa", "x:1x", "x:-1", "x:1,,y:1"])
def test_what_is_no_shape_is_told_what_one_is(text):
    with pytest.raises(ConfigError, match=r"--opt-shapes .*: expected name:1x16x64x64"):
        parse_shapes("--opt-shapes", text)


def test_an_input_named_twice_is_an_error():
    with pytest.raises(ConfigError, match="x is given twice"):
        parse_shapes("--opt-shapes", "x:1,x:2")


def bounds(**texts: str) -> ShapeBounds:
    return ShapeBounds(**{end: parse_shapes(end, texts.get(end)) for end in ("min", "opt", "max")})


def test_the_flags_say_what_the_symbols_are_and_inputs_that_share_one_follow():
    asked = bounds(min="hidden_states:1x16x32x32", opt="hidden_states:2x16x64x64", max="hidden_states:8x16x128x64")
    table = {**SERVED.sizes, **asked.sizes(INPUTS)}
    (profile,) = profiles_for(INPUTS, [table])
    assert profile == {
        "hidden_states": Range(min=(1, 16, 32, 32), opt=(2, 16, 64, 64), max=(8, 16, 128, 64)),
        "timestep": Range(min=(1,), opt=(2,), max=(8,)),
    }


def test_one_flag_alone_is_a_fixed_shape():
    for end in ("min", "opt", "max"):
        assert bounds(**{end: "timestep:3"}).sizes(INPUTS) == {"batch": (3, 3, 3)}
    assert bounds(min="timestep:1", max="timestep:4").sizes(INPUTS) == {"batch": (1, 4, 4)}


def test_flags_that_contradict_the_graph_are_refused():
    with pytest.raises(ConfigError, match=r"timestep has 1 axes in the graph, 1x2 has 2"):
        bounds(opt="timestep:1x2").sizes(INPUTS)
    with pytest.raises(ConfigError, match=r"axis 1 of hidden_states is 16 in the graph, not 4"):
        bounds(opt="hidden_states:1x4x64x64").sizes(INPUTS)
    with pytest.raises(ConfigError, match=r"timestep has batch 2, another input has 1; they are one"):
        bounds(opt="hidden_states:1x16x64x64,timestep:2").sizes(INPUTS)


def test_a_best_shape_outside_is_refused():
    asked = bounds(min="timestep:1", opt="timestep:9", max="timestep:8")
    with pytest.raises(ConfigError, match="1 <= min <= opt <= max, not 1, 9, 8"):
        profiles_for([TIMESTEP], [asked.sizes([TIMESTEP])])


def test_an_input_of_no_graph_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"hidden_state: no graph has an input .* did you mean hidden_states\?"):
        bounds(opt="hidden_state:1").require_known(["hidden_states", "timestep"])


pixels = st.integers(1, 96).map(lambda step: step * 16)
ends = st.tuples(pixels, pixels).map(sorted)
images = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda found: tuple(sorted(found)))


@st.composite
def items(draw):
    (w0, w1), (h0, h1) = draw(ends), draw(ends)
    return SizeProfile(smallest=(w0, h0), largest=(w1, h1), images=draw(images))


@given(st.lists(items(), min_size=1, max_size=4, unique=True))
def test_every_profile_is_read_as_it_is_written(found):
    assert parse_profiles([",".join(map(str, found))]) == tuple(found)


@given(st.lists(items(), min_size=1, max_size=4, unique=True), st.booleans())
def test_every_profile_serves_its_own_ends(found, denoiser):
    profiles = profiles_for(INPUTS, tables(found, SERVED, denoiser=denoiser))
    for profile in profiles:
        for end in ("min", "opt", "max"):
            assert choose(profiles, {name: getattr(limits, end) for name, limits in profile.items()}) is not None


@given(st.text(alphabet="0123456789x-@, ", max_size=24))
def test_any_text_is_a_profile_or_a_clear_error(text):
    try:
        found = parse_profiles([text])
    except ConfigError as error:
        assert "--profile" in str(error)  # noqa: PT017
    else:
        assert parse_profiles([",".join(map(str, found))]) == found
