"""Triton's Python model, in a stand-in for Triton: what it draws is what the runtime draws alone."""

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.server.options import Bounds

PROMPT = "a large red circle above a small blue square"
INTERNAL, INVALID_ARG, CANCELLED = 1, 3, 7


@pytest.fixture(scope="module")
def alone(sd3_bundle: Path) -> Pipeline:
    return Pipeline(sd3_bundle, threads=1)


def test_the_picture_is_the_runtime_s_of_that_seed(pair: tuple[Any, Path], serve: Callable[..., Any]) -> None:
    _, bundle = pair
    server = serve(bundle)
    found = server.infer("draw", {"prompt": PROMPT, "seed": 7})
    expected = Pipeline(bundle, threads=1)(PROMPT, seed=7).arrays
    np.testing.assert_array_equal(found["image"], expected)
    np.testing.assert_array_equal(Image.open(io.BytesIO(found["png"][0, 0])), expected[0])
    assert found["seed"].tolist() == [[7]]


def test_every_input_reaches_the_pipeline(serve: Callable[..., Any], sd3_bundle: Path, alone: Pipeline) -> None:
    asked = {"negative_prompt": "two yellow stars", "num_inference_steps": 3, "guidance_scale": 2.0}
    sizes = {"height": 24, "width": 28}
    found = serve(sd3_bundle).infer("draw", {"prompt": PROMPT, "seed": 2**40, **asked, **sizes}, ["image"])
    assert set(found) == {"image"}
    np.testing.assert_array_equal(found["image"], alone(PROMPT, seed=2**40, **asked, **sizes).arrays)  # type: ignore[arg-type]


def test_an_image_can_be_changed(serve: Callable[..., Any], sd3_bundle: Path, alone: Pipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    asked = {"prompt": PROMPT, "seed": 1, "init_image": picture[None], "strength": 0.5}
    found = serve(sd3_bundle).infer("draw", asked)
    np.testing.assert_array_equal(found["image"], alone(PROMPT, seed=1, image=picture, strength=0.5).arrays)
    mask = np.where(np.arange(32) < 12, 255, 0).astype(np.uint8)[None].repeat(24, axis=0)
    found = serve(sd3_bundle).infer("draw", {**asked, "mask": mask[None]})
    np.testing.assert_array_equal(found["image"], alone(PROMPT, seed=1, image=picture, strength=0.5, mask=mask).arrays)


def test_a_control_picture_steers(serve: Callable[..., Any], controlnet_pair: tuple[Any, Path]) -> None:
    bundle = controlnet_pair[1]
    server, alone = serve(bundle), Pipeline(bundle, threads=1)
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2}
    for scale in ({}, {"control_scale": 0.5}):
        found = server.infer("draw", {**asked, "control": picture[None], **scale})["image"]
        expected = alone(PROMPT, seed=1, num_inference_steps=2, control=picture, **scale).arrays  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, expected)
    plain = server.infer("draw", {**asked, "height": 32, "width": 48})["image"]
    assert (plain != expected).any()


def test_requests_and_rows_of_one_batch_share_the_denoiser(serve: Callable[..., Any], sd3_bundle: Path) -> None:
    server = serve(sd3_bundle)
    single = [server.infer("draw", {"prompt": PROMPT, "seed": seed})["image"][0] for seed in range(3)]
    server.runs["draw_transformer"].clear()
    responses = server.ask(
        "draw", [{"prompt": [PROMPT] * 2, "seed": [0, 1]}, {"prompt": PROMPT, "seed": 2}], ["image", "seed"]
    )
    together = [image for response in responses for image in response.output_tensors()[1].as_numpy()]
    assert server.runs["draw_transformer"] == [6] * 4, "three guided images, four steps"
    # ONNX Runtime may sum a batch of six in another order than one of two: a value of 256 at most
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(together, single, strict=True)) <= 1


def test_a_run_never_has_more_rows_than_the_model_takes(serve: Callable[..., Any], sd3_bundle: Path) -> None:
    server = serve(sd3_bundle, images=1)
    assert server.configs["draw_transformer"].max_batch_size == 2
    server.infer("draw", {"prompt": PROMPT})
    assert set(server.runs["draw_transformer"]) == {2}


def test_without_a_seed_one_is_drawn_and_told(serve: Callable[..., Any], sd3_bundle: Path) -> None:
    server = serve(sd3_bundle)
    first, second = (server.infer("draw", {"prompt": [PROMPT] * 2}) for _ in range(2))
    assert len({*first["seed"].ravel(), *second["seed"].ravel()}) == 4
    again = server.infer("draw", {"prompt": [PROMPT] * 2, "seed": first["seed"]})
    np.testing.assert_array_equal(again["image"], first["image"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps should be at least 1"),
        ({"num_inference_steps": 9}, "at most 8 are taken"),
        ({"height": 33}, "height should be a multiple of 4"),
        ({"height": 32}, "size has 1024 pixels; at most 800"),
        ({"seed": -1}, "seed should not be negative"),
        ({"guidance_scale": float("nan")}, "guidance_scale should be a finite number"),
        ({"negative_prompt": "x" * 101}, "negative_prompt has 101 characters; at most 100"),
        ({"prompt": np.array([[b"\xff"]], np.object_)}, "prompt is no valid Unicode"),
        ({"strength": 0.5}, "there is no image"),
    ],
)
def test_a_wrong_request_is_told_so_and_the_others_are_answered(
    asked: Mapping[str, Any], message: str, serve: Callable[..., Any], sd3_bundle: Path
) -> None:
    server = serve(sd3_bundle, bounds=Bounds(steps=8, pixels=800, prompt_characters=100))
    fine = {"prompt": PROMPT, "num_inference_steps": 1, "height": 24}
    wrong, right = server.ask("draw", [{**fine, **asked}, fine])
    assert wrong.error().code() == INVALID_ARG
    assert message in wrong.error().message()
    assert not right.has_error()


def test_pictures_of_two_sizes_fit_no_tensor_but_a_list_of_files(serve: Callable[..., Any], sd3_bundle: Path) -> None:
    server = serve(sd3_bundle)
    asked = {"prompt": [PROMPT] * 2, "height": [24, 32], "num_inference_steps": [1, 2]}
    (response,) = server.ask("draw", [asked])
    assert "ask for png" in response.error().message()
    files = server.infer("draw", asked, ["png"])["png"]
    assert [Image.open(io.BytesIO(file)).size for file in files.ravel()] == [(32, 24), (32, 32)]


def test_a_request_that_is_cancelled_takes_no_more_steps(serve: Callable[..., Any], sd3_bundle: Path) -> None:
    server = serve(sd3_bundle)
    gone, stays = server.ask("draw", [{"prompt": PROMPT}, {"prompt": PROMPT}], cancelled=[0])
    assert gone.error().code() == CANCELLED
    assert not stays.has_error()
    assert set(server.runs["draw_transformer"]) == {2}


def test_where_a_shared_run_fails_each_is_run_alone(serve: Callable[..., Any], sd3_bundle: Path, refused: Any) -> None:
    server = serve(sd3_bundle)

    def break_run(name: str, inputs: Mapping[str, np.ndarray]) -> None:
        if name == "draw_transformer" and len(inputs["hidden_states"]) > 2:
            raise refused(INTERNAL, "out of memory")

    server.break_run = break_run
    responses = server.ask("draw", [{"prompt": PROMPT, "seed": seed} for seed in range(2)], ["png"])
    assert not any(response.has_error() for response in responses)
    assert server.runs["draw_transformer"] == [2] * 8


def test_what_a_bug_says_stays_inside(serve: Callable[..., Any], sd3_bundle: Path, caplog: Any) -> None:
    server = serve(sd3_bundle)

    def break_run(name: str, inputs: Mapping[str, np.ndarray]) -> None:
        raise ZeroDivisionError("a secret")

    server.break_run = break_run
    (response,) = server.ask("draw", [{"prompt": PROMPT}])
    assert response.error().code() == INTERNAL
    assert "secret" not in response.error().message()
    assert "a secret" in caplog.text


def test_a_model_that_fails_is_named(serve: Callable[..., Any], sd3_bundle: Path, refused: Any) -> None:
    server = serve(sd3_bundle)

    def break_run(name: str, inputs: Mapping[str, np.ndarray]) -> None:
        raise refused(INTERNAL, "CUDA is out of memory")

    server.break_run = break_run
    with pytest.raises(refused) as caught:
        server.infer("draw", {"prompt": PROMPT})
    assert caught.value.args == (INTERNAL, "draw_text_encoder: CUDA is out of memory")


def test_a_description_that_was_edited_is_refused(sd3_bundle: Path, serve: Callable[..., Any], tmp_path: Path) -> None:
    from obsdiff_runtime.errors import BundleError
    from obsdiff_runtime.triton import Orchestrator

    serve(sd3_bundle)
    folder = tmp_path / "repository-0" / "draw"
    (folder / "1" / "bundle" / "scheduler" / "scheduler_config.json").write_text("{}")
    told = {
        "model_config": '{"parameters": {}}',
        "model_repository": str(folder),
        "model_version": "1",
        "model_name": "draw",
    }
    with pytest.raises(BundleError, match=r"scheduler_config\.json"):
        Orchestrator.open(told, sys.modules["triton_python_backend_utils"])
