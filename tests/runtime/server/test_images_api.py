"""OpenAI's images API, asked by OpenAI's own client, and what stands beside it."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from obsdiff_runtime.noise import SOURCES
from obsdiff_runtime.pipeline import Pipeline

PROMPT = "a large red circle above a small blue square"


@pytest.fixture
def client(shared: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def alone(sd3_bundle: Path) -> Pipeline:
    return Pipeline(sd3_bundle, threads=1)


def pixels(encoded: str | None) -> np.ndarray:
    assert encoded is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def test_openai_s_client_gets_the_image_of_that_seed(client: openai.OpenAI, alone: Pipeline) -> None:
    found = client.images.generate(prompt=PROMPT, model="model-0", n=2, size="32x24", extra_body={"seed": 7})  # type: ignore[arg-type]
    expected = alone(PROMPT, seed=7, num_images=2, height=24, width=32).arrays
    assert found.data is not None
    np.testing.assert_array_equal(np.stack([pixels(each.b64_json) for each in found.data]), expected)
    assert found.size == "32x24"


def test_fields_of_diffusion_servers_go_to_the_pipeline(shared: Any, alone: Pipeline) -> None:
    asked = {"prompt": PROMPT, "negative_prompt": "two yellow stars", "num_inference_steps": 3, "guidance_scale": 2}
    answer = shared.draw(**asked, seed=1).json()
    expected = alone(PROMPT, negative_prompt="two yellow stars", num_inference_steps=3, guidance_scale=2.0, seed=1)
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), expected.arrays[0])
    assert answer["metrics"]["seed"] == 1
    assert set(answer["metrics"]["stage_seconds"]) == {"queue", "text", "denoise", "decode"}


def test_classes_are_drawn_by_name_and_one_that_there_is_not_is_explained(
    dit_pair: tuple[Any, Path], serving: Callable[..., Any]
) -> None:
    expected = Pipeline(dit_pair[1], threads=1)("golden retriever", seed=3).arrays[0]
    with serving(dit_pair[1]) as running:
        answer = running.draw(prompt="golden retriever", seed=3).json()
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), expected)
        for asked, message in (
            ({"prompt": "goldn retriever"}, "close are golden retriever"),
            ({"prompt": "0", "negative_prompt": "tench"}, "takes no negative prompt"),
        ):
            refused = running.draw(**asked)
            assert refused.status_code == 400
            assert message in refused.json()["error"]["message"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_means_what_its_source_of_noise_makes_of_it(source: str, shared: Any, alone: Pipeline) -> None:
    answer = shared.draw(prompt=PROMPT, seed=5, n=2, noise_source=source).json()
    expected = alone(PROMPT, seed=5, num_images=2, noise_source=source).arrays
    np.testing.assert_array_equal(np.stack([pixels(each["b64_json"]) for each in answer["data"]]), expected)


def test_without_a_seed_images_differ_and_the_seed_that_was_drawn_repeats_them(shared: Any) -> None:
    first, second = (shared.draw().json() for _ in range(2))
    assert first["data"] != second["data"]
    assert shared.draw(seed=first["metrics"]["seed"]).json()["data"] == first["data"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_that_was_asked_for(kind: str, shared: Any) -> None:
    url = shared.draw(output_format=kind, response_format="url", output_compression=50).json()["data"][0]["url"]
    head, _, data = url.partition(",")
    assert head == f"data:image/{kind};base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == kind.upper()


def test_openai_s_client_streams_previews_and_the_picture(client: openai.OpenAI, alone: Pipeline) -> None:
    stream = client.images.generate(
        prompt=PROMPT,
        size="32x32",
        stream=True,
        partial_images=2,
        extra_body={"seed": 4, "num_inference_steps": 6},  # type: ignore[arg-type]
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    shown = [pixels(event.b64_json) for event in events]
    np.testing.assert_array_equal(shown[2], alone(PROMPT, seed=4, num_inference_steps=6).arrays[0])
    assert not np.array_equal(shown[0], shown[1])


def test_progress_is_told_where_it_is_asked_for(shared: Any) -> None:
    asked = {"prompt": "a", "stream": True, "progress": True, "num_inference_steps": 3, "seed": 1}
    with shared.client.stream("POST", "/v1/images/generations", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        names = [line[7:] for line in answer.iter_lines() if line.startswith("event: ")]
    assert names == ["obsdiff.progress"] * 3 + ["image_generation.completed", "obsdiff.finished"]


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"sead": 1}, "sead", "unknown parameter 'sead'; did you mean seed?"),
        ({"n": 0}, "n", "n: input should be greater than or equal to 1"),
        ({"n": "2"}, "n", "n: input should be a valid integer"),
        ({"size": "32"}, "size", 'size: value error, should be "auto" or WIDTHxHEIGHT, such as 512x512'),
        ({"size": "30x32"}, "size", "width should be a multiple of 4, not 30; near are 28, 32"),
        ({"size": "99999x99999"}, "size", "height should be a multiple of 4, not 99999; near are 99996, 100000"),
        ({"num_inference_steps": 151}, "num_inference_steps", "num_inference_steps is 151; at most 150 are taken"),
        ({"prompt": ""}, "prompt", "prompt: string should have at least 1 character"),
        ({"prompt": "x" * 4001}, "prompt", "prompt has 4001 characters; at most 4000 are taken"),
        ({"noise_source": "cuda"}, "noise_source", "noise_source: input should be 'numpy' or 'torch'"),
        ({"seed": -1}, "seed", "seed: input should be greater than or equal to 0"),
        ({"num_frames": 5}, "num_frames", "num_frames 5: this pipeline draws pictures; leave it out"),
        ({"guidance_scale": 1e9}, "guidance_scale", "guidance_scale: input should be less than or equal to 100"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_openai_s_shape(
    asked: dict[str, Any], param: str | None, message: str, shared: Any
) -> None:
    answer = shared.draw(**asked)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == message
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_openai_s_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-image-1'; there are model-0, model-1"):
        client.images.generate(prompt="a", model="gpt-image-1")
    with pytest.raises(openai.BadRequestError, match="at most 150"):
        client.images.generate(prompt="a", extra_body={"num_inference_steps": 1000})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"prompt": "\\ud800"}', b"\xff"])
def test_a_body_that_is_no_request_is_one(body: bytes, shared: Any) -> None:
    answer = shared.client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_paths_and_methods_that_are_not_there_have_the_shape_too(shared: Any) -> None:
    for answer, status in (
        (shared.client.get("/v1/nothing"), 404),
        (shared.client.get("/v1/images/generations"), 405),
        (shared.client.get("/v1/models/none"), 404),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_models_tell_what_they_are(client: openai.OpenAI, shared: Any) -> None:
    assert [model.id for model in client.models.list()] == ["model-0", "model-1"]
    details = shared.client.get("/v1/models/model-1").json()["details"]
    assert (details["family"], details["sparsity"]) == ("sd3", "dense")
    assert details["devices"]["transformer"] == "CPUExecutionProvider"
    assert details["takes"] == {
        "negative_prompt": True,
        "guidance_scale": True,
        "guidance_scale_2": False,
        "size_step": 4,
        "frame_step": None,
        "pictures": {"least": 0, "most": 1, "bytes": 2**24},
        "changes": True,
        "control": False,
        "classes": None,
        "formats": ["png", "jpeg", "webp"],
    }


def test_health_readiness_and_metrics(shared: Any) -> None:
    shared.draw()
    assert shared.client.get("/health").json() == {"status": "ok", "failed": []}
    assert shared.client.get("/ready").json() == {"ready": True}
    text = shared.client.get("/metrics").text
    for name in (
        *("obsdiff_num_requests_running", "obsdiff_num_requests_waiting", "obsdiff_requests_total"),
        *("obsdiff_request_latency_seconds_bucket", "obsdiff_batch_rows_bucket", "obsdiff_images_total"),
        *('obsdiff_stage_seconds_count{model="model-0",stage="denoise"}', "process_resident_memory_bytes"),
    ):
        assert name in text


def test_a_key_is_wanted_where_there_are_any(start: Any) -> None:
    running = start(api_keys=("secret", "other"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}, {"authorization": ""}):
        answer = running.client.post("/v1/images/generations", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert running.client.get("/metrics", headers=headers).status_code == 401
    assert running.client.get("/health").status_code == 200
    good = {"authorization": "Bearer other"}
    assert running.client.post("/v1/images/generations", json={"prompt": "a"}, headers=good).status_code == 200
