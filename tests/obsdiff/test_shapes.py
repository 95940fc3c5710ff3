"""The words, the pictures and the checker, without any model."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff import shapes

items = st.builds(
    shapes.Item,
    colour=st.sampled_from(list(shapes.COLOURS)),
    shape=st.sampled_from(shapes.SHAPES),
    size=st.sampled_from([None, *shapes.SIZES]),
)
scenes = st.one_of(
    st.builds(
        lambda item, place: shapes.Scene(items=(item,), place=place),
        items,
        st.sampled_from([None, *shapes.PLACES]),
    ),
    st.builds(
        lambda first, second, relation: shapes.Scene(items=(first, second), relation=relation),
        items,
        items,
        st.sampled_from(list(shapes.RELATIONS)),
    ),
)


@given(scenes)
def test_a_caption_parses_back_to_its_scene(scene: shapes.Scene) -> None:
    assert shapes.parse(str(scene)) == scene


@pytest.mark.parametrize(
    "caption", ["", "a circle", "a red dog", "a big red circle", "a red circle near a blue square", "red circle above"]
)
def test_what_is_no_caption_is_an_error_that_shows_the_grammar(caption: str) -> None:
    with pytest.raises(ValueError, match="expected 'a \\[size\\] COLOUR SHAPE"):
        shapes.parse(caption)


def test_drawn_pictures_obey_their_captions() -> None:
    captions = shapes.captions(150, seed=1)
    obeyed = [shapes.obeys(shapes.draw(shapes.parse(c), 64, seed=i), c).all for i, c in enumerate(captions)]
    assert all(obeyed)


@pytest.mark.parametrize("size", [48, 96])
def test_drawn_pictures_obey_at_other_sizes(size: int) -> None:
    captions = shapes.captions(30, seed=2)
    assert all(shapes.obeys(shapes.draw(shapes.parse(c), size, seed=i), c).all for i, c in enumerate(captions))


def test_blurred_and_noisy_pictures_still_obey() -> None:
    """What an autoencoder does to a picture is about a three-tap blur and noise of a few levels."""
    rng = np.random.default_rng(0)
    captions = shapes.captions(40, seed=3)
    for i, caption in enumerate(captions):
        picture = shapes.draw(shapes.parse(caption), 64, seed=i).astype(np.float64)
        for axis in (0, 1):
            picture = 0.5 * picture + 0.25 * (np.roll(picture, 1, axis) + np.roll(picture, -1, axis))
        noisy = np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)
        assert shapes.obeys(noisy, caption).all, caption


def test_pictures_do_not_obey_other_captions() -> None:
    captions = shapes.captions(40, seed=4)
    pictures = [shapes.draw(shapes.parse(c), 64, seed=i) for i, c in enumerate(captions)]
    wrong = [
        shapes.obeys(p, c).all for (p, _), (_, c) in itertools.permutations(zip(pictures, captions, strict=True), 2)
    ]
    # Only a picture that happens to fit a second caption may obey it: a small red cross that lies on the left, say.
    assert np.mean(wrong) < 0.005


@pytest.mark.parametrize(
    ("caption", "broken"),
    [
        ("a small blue square above a large red circle", {"position"}),
        ("a large red square below a small blue circle", {"shape"}),
        ("a large blue circle below a small red square", {"colour"}),
        ("a small red circle below a large blue square", {"size"}),
        ("a large red circle", {"count"}),
    ],
)
def test_each_attribute_is_told_apart(caption: str, broken: set[str]) -> None:
    drawn = "a large red circle above a small blue square"
    if "position" not in broken:
        drawn = "a large red circle below a small blue square"
    else:
        caption = "a large red circle below a small blue square"
    verdict = shapes.obeys(shapes.draw(shapes.parse(drawn), 64, seed=5), caption)
    assert {name for name in ("count", "colour", "shape", "size", "position") if not getattr(verdict, name)} == broken


def test_an_empty_picture_obeys_nothing() -> None:
    verdict = shapes.obeys(np.full((64, 64, 3), 230, np.uint8), "a red circle")
    assert verdict == shapes.Obedience(count=False, colour=False, shape=False, size=False, position=False)


def test_noise_obeys_nothing() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not shapes.obeys(picture, "a red circle").all


def test_touching_objects_are_found_apart() -> None:
    picture = np.full((64, 64, 3), 230, np.uint8)
    picture[10:36, 20:46] = shapes.COLOURS["red"]
    picture[36:50, 26:40] = shapes.COLOURS["blue"]
    assert shapes.obeys(picture, "a large red square above a small blue square").all


def test_splits_share_no_caption() -> None:
    calibration = set(shapes.calibration_captions(300, seed=0))
    evaluation = set(shapes.evaluation_captions(300, seed=0))
    trained = set(shapes.captions(3000, seed=0, held_out=False, split="train"))
    assert not calibration & evaluation
    assert not (calibration | evaluation) & trained


def test_evaluation_prompts_are_distinct_and_mostly_of_two_objects() -> None:
    prompts = shapes.evaluation_captions(200, seed=0)
    assert len(set(prompts)) == 200
    assert sum(len(shapes.parse(p).items) == 2 for p in prompts) == 160


def test_held_out_pairs_are_kept_apart() -> None:
    assert not any(shapes.parse(c).held_out for c in shapes.captions(500, seed=0, held_out=False))
    assert all(shapes.parse(c).held_out for c in shapes.captions(500, seed=0, held_out=True))
    pairs = {(c, s) for c in shapes.COLOURS for s in shapes.SHAPES} - shapes.HELD_OUT
    assert {c for c, _ in pairs} == set(shapes.COLOURS)
    assert {s for _, s in pairs} == set(shapes.SHAPES)


def test_same_seed_same_captions_and_pictures() -> None:
    assert shapes.captions(20, seed=7) == shapes.captions(20, seed=7)
    scene = shapes.parse("a red circle")
    assert np.array_equal(shapes.draw(scene, 64, seed=1), shapes.draw(scene, 64, seed=1))
