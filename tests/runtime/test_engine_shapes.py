import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff_runtime.bundle import ComponentEntry, Defaults, EngineEntry, Manifest, read_manifest, write_manifest
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.shapes import Range, choose, nearest, refusal, serving, words

SYMBOLS = {"x": ("batch", 16, "height", "width"), "t": ("batch",)}


def profile(batch, height, width):
    def shape(index):
        return (batch[index], 16, height[index], width[index])

    return {
        "x": Range(min=shape(0), opt=shape(1), max=shape(2)),
        "t": Range(min=batch[:1], opt=batch[1:2], max=batch[2:]),
    }


def request(batch, height, width):
    return {"x": (batch, 16, height, width), "t": (batch,)}


SQUARE = profile((1, 2, 8), (64, 64, 64), (64, 64, 64))
WIDE = profile((1, 2, 2), (64, 64, 64), (64, 96, 128))
ANY = profile((1, 4, 8), (32, 64, 128), (32, 64, 128))


def test_the_profile_that_takes_the_shapes_serves_them():
    assert serving([SQUARE, WIDE], request(2, 64, 96)) == 1
    assert serving([SQUARE, WIDE], request(4, 64, 64)) == 0


def test_of_several_the_one_timed_nearest_serves():
    assert choose([ANY, SQUARE], request(2, 64, 64)) == 1
    assert choose([ANY, SQUARE], request(4, 64, 64)) == 0


def test_a_request_outside_is_answered_with_the_nearest_profile_in_the_users_units():
    with pytest.raises(ConfigError) as caught:
        serving([SQUARE, WIDE], request(2, 64, 160), SYMBOLS, {"height": 8, "width": 8})
    assert str(caught.value) == (
        "the engine does not take width 1280: the nearest of its 2 profiles (number 2) takes width 512 to 1024"
    )


def test_a_shared_axis_is_named_once():
    told = refusal([SQUARE], request(9, 64, 64), SYMBOLS)
    assert told == "the engine does not take batch 9: its profile takes batch 1 to 8"


def test_without_symbols_the_axis_is_named_by_its_place():
    assert refusal([SQUARE], request(1, 32, 64)) == (
        "the engine does not take axis 2 of x 32: its profile takes axis 2 of x 64"
    )


def test_a_profile_in_words():
    assert words(SQUARE, SYMBOLS, {"height": 8, "width": 8}) == "batch 1 to 8 (timed at 2), height 512, width 512"
    assert words({"t": Range(min=(1,), opt=(1,), max=(1,))}, {"t": (1,)}) == "fixed shapes"


def test_other_inputs_and_other_ranks_are_errors():
    with pytest.raises(ConfigError, match="takes t, x, not t"):
        choose([SQUARE], {"t": (1,)})
    with pytest.raises(ConfigError, match="x has 1 axes, the engine takes 4"):
        choose([SQUARE], {"t": (1,), "x": (1,)})


def test_an_engine_without_profiles_is_told_to_be_built_again():
    with pytest.raises(ConfigError, match="build it again"):
        nearest([], request(1, 64, 64))


sizes = st.integers(1, 300)
triples = st.tuples(sizes, sizes, sizes).map(lambda found: tuple(sorted(found)))


@given(profiles=st.lists(st.builds(profile, triples, triples, triples), min_size=1, max_size=4),
       shapes=st.builds(request, sizes, sizes, sizes))  # fmt: skip
def test_what_is_chosen_takes_the_shapes_and_what_is_refused_fits_none(profiles, shapes):
    def fits(candidate):
        return all(
            low <= size <= high
            for name, limits in candidate.items()
            for low, size, high in zip(limits.min, shapes[name], limits.max, strict=True)
        )

    found = choose(profiles, shapes)
    if found is None:
        assert not any(map(fits, profiles))
        assert 0 <= nearest(profiles, shapes) < len(profiles)
        assert "does not take" in refusal(profiles, shapes)
    else:
        assert fits(profiles[found])
        assert fits(profiles[nearest(profiles, shapes)])


def test_the_manifest_tells_what_an_engine_was_built_for(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"graph")
    (tmp_path / "k.plan").write_bytes(b"plan")
    entry = EngineEntry(
        path="k.plan",
        key="k",
        backend="tensorrt",
        backend_version="10.13.3.9",
        targets=("9.0",),
        device="NVIDIA H200",
        profiles=(SQUARE, WIDE),
        refit="stripped",
        weight_streaming=True,
    )
    written = write_manifest(
        tmp_path,
        Manifest(
            created_by="a test",
            family="sd3",
            pipeline_class="StableDiffusion3Pipeline",
            sparsity="2:4",
            defaults=Defaults(height=512, width=512, num_inference_steps=1, guidance_scale=1.0),
            components={
                "transformer": ComponentEntry(onnx="m.onnx", dtype="float16", inputs=(), outputs=(), engines=(entry,))
            },
        ),
    )
    assert read_manifest(tmp_path) == written
