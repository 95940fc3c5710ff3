"""Editing by OpenAI's images API: pictures in a form, asked by OpenAI's own client."""

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from obsdiff_runtime import references
from obsdiff_runtime.bundle import ENCODER, open_bundle, write_manifest
from obsdiff_runtime.masks import mask_of
from obsdiff_runtime.pictures import resized
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.server.limits import MAX_FORM_BYTES

PROMPT = "make it winter"
OTHER = {"model": "model-1"}
"""Which changes a picture; the first one's denoiser is told it."""


@pytest.fixture(scope="module")
def running(flux2_pair: tuple[Any, Path], sd3_bundle: Path, serving: Callable[..., Any]) -> Iterator[Any]:
    with serving(flux2_pair[1], sd3_bundle) as found:
        yield found


@pytest.fixture
def client(running: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def file_of(height: int, width: int, seed: int = 0, kind: str = "png") -> tuple[str, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return f"{seed}.{kind}", file.getvalue()


def black() -> tuple[str, bytes]:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "png")
    return "black.png", file.getvalue()


def test_openai_s_client_changes_a_picture_or_the_part_of_it_that_its_mask_has_transparent(
    client: openai.OpenAI, sd3_bundle: Path
) -> None:
    """At the size that is asked for, and by a strength."""
    image, mask = file_of(66, 96), io.BytesIO()
    redrawn = np.zeros((33, 48), bool)
    redrawn[8:20, 10:40] = True
    Image.fromarray(np.dstack([np.zeros((33, 48, 3), np.uint8), np.where(redrawn, 0, 255)]).astype(np.uint8)).save(
        mask, "png"
    )
    ours = Pipeline(sd3_bundle, threads=1)
    told = {"seed": 7, "num_inference_steps": 3, "height": 24, "width": 32}
    told["image"] = resized(Image.open(io.BytesIO(image[1])), 32, 24)
    cut = mask_of(Image.open(mask), 32, 24)
    for strength, masked in ((None, False), (0.5, False), (None, True), (0.5, True)):
        more = {"seed": 7, "num_inference_steps": 3} | ({} if strength is None else {"strength": strength})
        file = {"mask": ("mask.png", mask.getvalue())} if masked else {}
        found = client.images.edit(
            image=image,
            prompt=PROMPT,
            model="model-1",
            size="32x24",  # type: ignore[call-overload]
            extra_body=more,
            **file,
        )
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json))))
        expected = ours(PROMPT, strength=strength, mask=cut if masked else None, **told).arrays[0]
        np.testing.assert_array_equal(drawn, expected)


def test_openai_s_client_edits_pictures(client: openai.OpenAI, flux2_pair: tuple[Any, Path]) -> None:
    files = [file_of(66, 96), file_of(64, 64, seed=1)]
    more = {"seed": 7, "num_inference_steps": 2}
    found = client.images.edit(image=files, prompt=PROMPT, model="model-0", size="32x24", extra_body=more)  # type: ignore[call-overload]
    ours = Pipeline(flux2_pair[1], threads=1)
    references = [ours.fit(Image.open(io.BytesIO(content))) for _, content in files]
    given = {"seed": 7, "num_inference_steps": 2, "height": 24, "width": 32}
    expected = ours(PROMPT, reference=references, **given).arrays[0]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json))))
    np.testing.assert_array_equal(drawn, expected)
    assert not np.array_equal(drawn, ours(PROMPT, **given).arrays[0])


def test_a_control_picture_steers_alone_and_beside_one_that_is_changed(
    make_pair: Callable[[str], tuple[Any, Path]], serving: Callable[..., Any]
) -> None:
    folder, control, image = make_pair("controlnet")[1], file_of(48, 64), file_of(24, 32, seed=1)
    fields = {"prompt": PROMPT, "size": "32x24", "seed": "7", "num_inference_steps": "3"}
    ours = Pipeline(folder, threads=1)
    pixels = {name: resized(Image.open(io.BytesIO(file[1])), 32, 24) for name, file in (("c", control), ("i", image))}
    given = {"seed": 7, "num_inference_steps": 3, "height": 24, "width": 32, "control": pixels["c"]}
    with serving(folder) as found:
        for more, files, told in (
            ({}, {}, {}),
            ({"control_scale": "0.3"}, {}, {"control_scale": 0.3}),
            ({"strength": "0.6"}, {"image": image}, {"image": pixels["i"], "strength": 0.6}),
        ):
            answer = found.client.post("/v1/images/edits", data=fields | more, files={"control": control, **files})
            assert answer.status_code == 200, answer.text
            drawn = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
            np.testing.assert_array_equal(np.asarray(drawn), ours(PROMPT, **given, **told).arrays[0])
        (model,) = found.client.get("/v1/models").json()["data"]
    assert model["details"]["takes"]["control"]


def test_what_draws_nothing_without_a_picture_is_served(
    qwen_edit_pair: tuple[Any, Path], serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first request, too, for which the server draws once."""
    monkeypatch.setattr(references, "_MEGAPIXEL", 64 * 64)
    fields = {"prompt": PROMPT, "size": "32x24", "seed": "7", "num_inference_steps": "2", "guidance_scale": "1"}
    file = file_of(64, 64)
    with serving(qwen_edit_pair[1]) as found:
        edited = found.client.post("/v1/images/edits", data=fields, files={"image": file})
        refused = found.client.post("/v1/images/generations", json={"prompt": PROMPT, "size": "32x24"})
    assert (edited.status_code, refused.status_code) == (200, 400), edited.text
    assert "draws nothing without one" in refused.json()["error"]["message"]
    ours = Pipeline(qwen_edit_pair[1], threads=1)
    given = {"seed": 7, "num_inference_steps": 2, "height": 24, "width": 32, "guidance_scale": 1.0}
    expected = ours(PROMPT, reference=ours.fit(Image.open(io.BytesIO(file[1]))), **given).arrays[0]
    drawn = Image.open(io.BytesIO(base64.b64decode(edited.json()["data"][0]["b64_json"])))
    np.testing.assert_array_equal(np.asarray(drawn), expected)


def test_a_bundle_that_reads_no_pictures_says_so_and_offers_none(
    flux2_pair: tuple[Any, Path], serving: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = open_bundle(flux2_pair[1]).manifest
    components = {name: entry for name, entry in manifest.components.items() if name != ENCODER}
    shutil.copytree(flux2_pair[1], tmp_path / "blind", ignore=shutil.ignore_patterns(ENCODER))
    write_manifest(tmp_path / "blind", replace(manifest, components=components))
    with serving(tmp_path / "blind") as found:
        answer = found.client.post("/v1/images/edits", data={"prompt": PROMPT}, files={"image": file_of(64, 64)})
        (model,) = found.client.get("/v1/models").json()["data"]
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["message"], error["param"]) == ("this bundle has no VAE encoder, so that it reads no images", "image")
    assert model["details"]["takes"]["pictures"] is None


def test_an_edit_is_streamed_under_its_own_name(client: openai.OpenAI) -> None:
    events = client.images.edit(
        image=file_of(64, 64),
        prompt=PROMPT,
        size="32x24",  # type: ignore[call-overload]
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 2},
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("fields", "files", "status", "message"),
    [
        ({"prompt": PROMPT}, [], 400, "image: there is none; send a picture, or as control what steers the model"),
        ({"prompt": PROMPT}, [("image[]", file_of(4, 4))] * 5, 400, "image: 5 pictures"),
        ({}, [("image", file_of(64, 64))], 400, "prompt: field required"),
        ({"prompt": PROMPT, "n": "two"}, [("image", file_of(64, 64))], 400, "n: input should be a valid integer"),
        ({"prompt": PROMPT, "seeds": "3"}, [("image", file_of(64, 64))], 400, "did you mean seed?"),
        ({"prompt": PROMPT}, [("masks", file_of(64, 64))], 400, "masks: no file of that name is read"),
        ({"prompt": PROMPT}, [("mask", file_of(64, 64))], 400, "mask: it says which part of an image is drawn anew"),
        ({"prompt": PROMPT, "control": "a.png"}, [("image", file_of(64, 64))], 400, "control: should be a file"),
        ({"prompt": PROMPT}, [("image", file_of(64, 64)), ("mask", file_of(64, 64))], 400, "changes no part of a pict"),
        ({"prompt": PROMPT, **OTHER}, [("image", file_of(8, 8)), *[("mask", file_of(8, 8))] * 2], 400, "mask: 2 files"),
        ({"prompt": PROMPT, **OTHER}, [("image", file_of(8, 8)), ("mask", ("m", b"no"))], 400, "m: no image that can"),
        (
            {"prompt": PROMPT, **OTHER},
            [("image", file_of(8, 8)), ("mask", black())],
            400,
            "mask: nothing is drawn anew",
        ),
        ({"prompt": PROMPT, **OTHER}, [("image", file_of(8, 8))] * 2, 400, "image: 2 pictures; this model takes 1"),
        ({"prompt": PROMPT}, [("control", file_of(8, 8))], 400, "control: nothing steers this model"),
        ({"prompt": PROMPT, "control_scale": "1"}, [("image", file_of(8, 8))], 400, "control_scale says how much"),
        ({"prompt": PROMPT, "strength": "0"}, [("image", file_of(8, 8))], 400, "strength: input should be greater"),
        ({"prompt": PROMPT, "strength": "0.5"}, [("image", file_of(64, 64))], 400, "there is no image"),
        (
            {"prompt": PROMPT},
            [("image", ("a.png", b"no picture"))],
            400,
            "a.png: no image that can be read: it is none of PNG",
        ),
        ({"prompt": PROMPT}, [("image", file_of(64, 64, kind="bmp"))], 400, "0.bmp: no image that can be read"),
        ({"prompt": PROMPT}, [("image", file_of(3, 64))], 400, "the model reads no fewer than 4"),
        ({"prompt": PROMPT, "model": "dall-e-3"}, [("image", file_of(64, 64))], 404, "there is no model 'dall-e-3'"),
        ({"prompt": PROMPT}, [("image", ("a.png", bytes(MAX_FORM_BYTES)))], 413, "larger than"),
    ],
)
def test_what_cannot_be_edited_is_said_in_openai_s_shape(
    running: Any, fields: dict[str, str], files: list[Any], status: int, message: str
) -> None:
    plain = [(name, (None, value)) for name, value in fields.items()] or [("user", (None, "x"))]
    answer = running.client.post("/v1/images/edits", files=[*plain, *files])
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_body_that_is_no_form_is_refused(running: Any) -> None:
    answer = running.client.post("/v1/images/edits", json={"prompt": PROMPT})
    assert answer.status_code == 400
    assert "should be a form" in answer.json()["error"]["message"]


def test_a_picture_of_too_many_pixels_is_not_decoded(running: Any) -> None:
    file = io.BytesIO()
    Image.new("1", (6000, 5000)).save(file, "png")
    answer = running.client.post(
        "/v1/images/edits", files={"image": ("big.png", file.getvalue())}, data={"prompt": PROMPT}
    )
    assert answer.status_code == 400
    assert "big.png: 30000000 pixels; at most 25000000 are read" in answer.json()["error"]["message"]
