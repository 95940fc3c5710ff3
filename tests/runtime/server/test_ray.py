"""The Ray Serve application on a local cluster: the same API, two replicas, one of them killed under load."""

import base64
import io
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pipeline import Pipeline

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'obsdiff[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own
TILE = 16
PROMPT = "a large red circle above a small blue square"


def test_numbers_that_make_no_sense_are_refused_before_anything_starts(tmp_path: Path) -> None:
    from pydantic import ValidationError

    from obsdiff.ray import Asked, build

    with pytest.raises(ConfigError, match="max_replicas 1 is less than replicas 2"):
        build(Asked(bundles=["a"], replicas=2, max_replicas=1))
    with pytest.raises(ConfigError, match="the API keys cannot be read"):
        build(Asked(bundles=["a"], api_keys=tmp_path / "none"))
    with pytest.raises(ValidationError, match="replica"):
        Asked.model_validate({"bundles": "a", "replica": 2})


def test_the_load_sets_the_number_of_replicas_between_two_bounds() -> None:
    from obsdiff.ray import Asked, build

    def deployment(**asked: Any) -> Any:
        return build(Asked(bundles=["a"], **asked))._bound_deployment

    fixed, growing = deployment(replicas=3, gpus=0.5), deployment(replicas=1, max_replicas=4, max_rows=8)
    assert fixed.num_replicas == 3
    assert fixed.ray_actor_options["num_gpus"] == 0.5
    scaling = growing._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 4)


def replicas() -> dict[int, psutil.Process]:
    """Processes of the replicas, by number."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found[process.pid] = process
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def url(sd3_bundle: Path) -> Iterator[str]:
    """Two replicas on a cluster of this machine, which decode in tiles."""
    from ray import serve

    from obsdiff.ray import Asked, build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(Asked(bundles=[f"tiny={sd3_bundle}"], replicas=2, threads=1, vae_tile=TILE)))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def test_openai_s_client_gets_the_picture_of_that_seed_and_events(url: str, sd3_bundle: Path) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        found = client.images.generate(prompt=PROMPT, model="tiny", extra_body={"seed": 7})
    assert found.data is not None
    expected, whole = (
        Pipeline(sd3_bundle, threads=1, vae_tiling=tile)(PROMPT, seed=7).arrays[0] for tile in (TILE, False)
    )
    assert not np.array_equal(expected, whole)
    picture = Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json or "")))
    np.testing.assert_array_equal(np.asarray(picture), expected)
    asked = {"prompt": PROMPT, "stream": True, "partial_images": 1}
    with httpx.stream("POST", f"{url}/v1/images/generations", json=asked, timeout=60) as answer:
        events = [line for line in answer.iter_lines() if line.startswith("event:")]
    assert events == ["event: image_generation.partial_image", "event: image_generation.completed"]
    assert httpx.get(f"{url}/ready").status_code == 200


def test_a_replica_that_is_killed_under_load_loses_no_request_of_a_client_that_retries(url: str) -> None:
    before = replicas()
    assert len(before) == 2

    def draw(client: openai.OpenAI, seed: int) -> str:
        extra = {"seed": seed, "num_inference_steps": 60}
        data = client.images.generate(prompt=PROMPT, extra_body=extra).data
        assert data is not None
        return data[0].b64_json or ""

    patient = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=60)
    with patient as client, ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(draw, client, seed % 6) for seed in range(60)]
        while sum(answer.done() for answer in answers) < 6:
            time.sleep(0.01)
        killed = next(iter(before))
        before[killed].kill()
        pictures = [answer.result() for answer in answers]
    assert len(set(pictures)) == 6, "a seed draws the same picture in both replicas"
    deadline = time.monotonic() + 120
    while len(replicas().keys() - {killed}) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(replicas().keys() - before.keys()) == 1, "another one has taken its place"
