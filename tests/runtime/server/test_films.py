"""Films as data of the images API."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from obsdiff_runtime.pictures import resized
from obsdiff_runtime.pipeline import Pipeline


def frames(encoded: str) -> np.ndarray:
    shown = []
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        for index in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(index)
            shown.append(np.asarray(image.convert("RGB")))
    return np.stack(shown)


@pytest.fixture(scope="module")
def running(wan_pair: tuple[Any, Path], serving: Callable[..., Any]) -> Any:
    with serving(wan_pair[1]) as server:
        yield server


def test_a_film_comes_as_a_picture_that_moves(running: Any, wan_pair: tuple[Any, Path]) -> None:
    expected = Pipeline(wan_pair[1], threads=1)("a ring", seed=7).arrays[0]
    answer = running.draw(prompt="a ring", seed=7).json()
    np.testing.assert_array_equal(frames(answer["data"][0]["b64_json"]), expected)
    lossy = running.draw(prompt="a ring", seed=7, output_format="webp", output_compression=100).json()
    found = frames(lossy["data"][0]["b64_json"])
    assert found.shape == (9, 32, 32, 3)
    assert np.corrcoef(found.mean(-1).ravel(), expected.mean(-1).ravel())[0, 1] > 0.9


def test_a_film_is_as_long_as_it_is_asked_for(running: Any, wan_pair: tuple[Any, Path]) -> None:
    expected = Pipeline(wan_pair[1], threads=1)("a ring", seed=7, num_frames=5).arrays[0]
    answer = running.draw(prompt="a ring", seed=7, num_frames=5).json()
    np.testing.assert_array_equal(frames(answer["data"][0]["b64_json"]), expected)
    for asked, message in (
        ({"num_frames": 6}, "num_frames 6: a film has"),
        ({"num_frames": 41}, "num_frames is 41; at most 36 of that size are drawn here"),
        ({"guidance_scale_2": 2}, "guidance_scale_2"),
    ):
        refused = running.draw(**asked)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]


def test_a_format_that_holds_no_film_is_refused(running: Any) -> None:
    answer = running.draw(output_format="jpeg")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "model-0 draws films, and jpeg holds none; ask for png or webp"


def test_a_film_that_can_begin_with_a_picture_begins_with_that_of_an_edit(
    wan_ti2v_pair: tuple[Any, Path], serving: Callable[..., Any]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 72, 3), dtype=np.uint8))
    content = io.BytesIO()
    image.save(content, "png")
    asked: dict[str, Any] = {"prompt": "a ring", "seed": 7, "size": "48x32"}
    with serving(wan_ti2v_pair[1]) as running:
        form = {name: str(value) for name, value in asked.items()}
        file = ("photo.png", content.getvalue())
        begun = running.client.post("/v1/images/edits", data=form, files={"image": file}).json()
        plain = running.draw(**asked).json()
        (model,) = running.client.get("/v1/models").json()["data"]
    ours = Pipeline(wan_ti2v_pair[1], threads=1)
    for answer, told in ((begun, {"image": resized(image, 48, 32)}), (plain, {})):
        expected = ours("a ring", seed=7, height=32, width=48, **told).arrays[0]
        np.testing.assert_array_equal(frames(answer["data"][0]["b64_json"]), expected)
    assert (model["details"]["takes"]["pictures"]["least"], model["details"]["takes"]["pictures"]["most"]) == (0, 1)


def test_a_film_begins_with_the_picture_of_an_edit_and_ends_with_a_second(
    wan22_i2v_pair: tuple[Any, Path], serving: Callable[..., Any]
) -> None:
    """Scaled to the size that is drawn; there is none without a picture, nor with three."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 72, 3), dtype=np.uint8))
    content = io.BytesIO()
    image.save(content, "png")
    file = ("photo.png", content.getvalue())
    with serving(wan22_i2v_pair[1]) as running:
        form = {"prompt": "a ring", "seed": "7", "size": "48x32", "guidance_scale_2": "1"}
        answer = running.client.post("/v1/images/edits", data=form, files={"image": file})
        both = running.client.post("/v1/images/edits", data=form, files=[("image[]", file)] * 2)
        several = running.client.post("/v1/images/edits", data=form, files=[("image[]", file)] * 3)
        large = running.client.post("/v1/images/edits", data={**form, "size": "65536x65536"}, files={"image": file})
        without = running.draw()
    ours, shown = Pipeline(wan22_i2v_pair[1], threads=1), resized(image, 48, 32)
    for found, last in ((answer, None), (both, shown)):
        expected = ours("a ring", image=shown, last_image=last, seed=7, guidance_scale_2=1.0).arrays[0]
        np.testing.assert_array_equal(frames(found.json()["data"][0]["b64_json"]), expected)
    assert several.status_code == large.status_code == without.status_code == 400
    assert "size has 4294967296 pixels; at most 4096 are drawn here" in large.json()["error"]["message"]
    assert several.json()["error"]["message"] == "image: 3 pictures; this model takes 2"
    assert "begin with a picture" in without.json()["error"]["message"]


def test_a_film_that_must_end_with_a_picture_wants_two(
    wan_flf2v_pair: tuple[Any, Path], serving: Callable[..., Any]
) -> None:
    pictures = [np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8) for seed in (0, 1)]
    files = []
    for pixels in pictures:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        files.append(("image[]", ("photo.png", content.getvalue())))
    with serving(wan_flf2v_pair[1]) as running:
        form = {"prompt": "a ring", "seed": "7", "size": "48x32"}
        both = running.client.post("/v1/images/edits", data=form, files=files)
        one = running.client.post("/v1/images/edits", data=form, files=files[:1])
        (model,) = running.client.get("/v1/models").json()["data"]
    image, last = (resized(Image.fromarray(pixels), 48, 32) for pixels in pictures)
    expected = Pipeline(wan_flf2v_pair[1], threads=1)("a ring", image=image, last_image=last, seed=7).arrays[0]
    np.testing.assert_array_equal(frames(both.json()["data"][0]["b64_json"]), expected)
    assert one.status_code == 400
    assert one.json()["error"]["message"] == "image: 1 picture; this model takes 2"
    assert one.json()["error"]["param"] == "image"
    assert (model["details"]["takes"]["pictures"]["least"], model["details"]["takes"]["pictures"]["most"]) == (2, 2)
