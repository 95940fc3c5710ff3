"""What breaks behind the server, and clients that misbehave: an answer with a reason, and nobody else notices."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from obsdiff_runtime.errors import ConfigError, MissingPackageError
from obsdiff_runtime.server import limits, options, run
from obsdiff_runtime.server.options import Bounds, Limits, Options

LONG = {"prompt": "a", "num_inference_steps": 100, "seed": 1}
ENDLESS = {"prompt": "a", "num_inference_steps": 10**5}
VERY_LONG = {"prompt": "a", "num_inference_steps": 3000}


def break_denoiser(running: Any, monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    networks = running.batcher.pipeline.networks
    run = networks.run

    def instead(component: str, inputs: Mapping[str, Any], outputs: Sequence[str], **more: Any) -> Any:
        found = run(component, inputs, outputs, **more)
        return broken(found) if component == "transformer" else found

    monkeypatch.setattr(networks, "run", instead)


def slowly(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time.sleep(0.02)
    return found


def raises(_: Any) -> Any:
    raise OSError("CUDA error 700 at /secret/place")


def nan(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.full_like(value, np.nan) for name, value in found.items()}


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_session_that_raises_is_an_error_that_hides_its_inside(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start()
    break_denoiser(running, monkeypatch, raises)
    answer = running.draw()
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "the server failed at this request; its log says why",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    monkeypatch.undo()
    assert running.draw().status_code == 200


def test_nan_is_an_error_and_not_a_black_image(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start()
    break_denoiser(running, monkeypatch, nan)
    answer = running.draw()
    assert answer.status_code == 500
    assert "not finite" in answer.json()["error"]["message"]
    with running.client.stream("POST", "/v1/images/generations", json={"prompt": "a", "stream": True}) as stream:
        assert stream.status_code == 200
        lines = list(stream.iter_lines())
    assert lines[0] == "event: error"
    assert "not finite" in json.loads(lines[1][6:])["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_drawn_for_no_longer(
    stream: bool, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    break_denoiser(running, monkeypatch, slowly)
    with httpx.Client(base_url=running.url, timeout=0.3) as hasty, pytest.raises(httpx.ReadTimeout):
        hasty.post("/v1/images/generations", json={**LONG, "num_inference_steps": 150, "stream": stream})
    wait_until(lambda: running.batcher.is_idle, 3)
    wait_until(lambda: 'status="499"' in running.client.get("/metrics").text)  # so it was not drawn to its end
    assert running.draw().status_code == 200


def test_a_full_queue_is_429_with_a_time_to_come_again(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start(limits=Limits(max_rows=2, max_waiting=1))
    break_denoiser(running, monkeypatch, slowly)
    with ThreadPoolExecutor(2) as others:
        slow = [others.submit(running.draw, **LONG)]
        wait_until(lambda: running.batcher.running == 1)
        slow.append(others.submit(running.draw, **LONG))
        wait_until(lambda: running.batcher.waiting == 1)
        picture = {"image": ("a.png", b"is not looked at")}
        edit = running.client.post("/v1/images/edits", files=picture, data={"prompt": "a"})
        assert edit.status_code == 429
        answer = running.draw()
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "server_overloaded"
        assert [each.result().status_code for each in slow] == [200, 200]
    assert 'obsdiff_rejections_total{model="model-0",reason="queue full"} 2.0' in running.client.get("/metrics").text


def test_a_deadline_is_504(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start(bounds=Bounds(deadline_s=0.2))
    break_denoiser(running, monkeypatch, slowly)
    answer = running.draw(**LONG)
    assert answer.status_code == 504
    assert "not finished within 0.2 s" in answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_413(shared: Any) -> None:
    answer = shared.client.post("/v1/images/generations", content=b"x" * (limits.MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert "larger than" in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_is_408(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.BoundedBodies.__init__, "__defaults__", (limits.MAX_BODY_BYTES, 0.2))
    running = start()
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as slow:
        slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_many_at_once_get_the_images_that_they_get_alone(shared: Any) -> None:
    asked = [{"seed": seed, "num_inference_steps": 2 + seed % 4, "n": 1 + seed % 2} for seed in range(24)]
    alone = [shared.draw(**each).json()["data"] for each in asked]
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda each: shared.draw(**each).json()["data"], asked))
    assert together == alone


class Process:
    """`serve` in a process of its own."""

    def __init__(self, bundle: Path) -> None:
        code = (
            "import sys; from obsdiff_runtime.server.run import serve; from obsdiff_runtime.server.options import *; "
            "options = Options(port=0, threads=1, bounds=Bounds(steps=10**6)); "
            "serve([sys.argv[1]], options, lambda url: print(url, flush=True))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        wait_until(lambda: self._answers("/health"))

    def _answers(self, path: str) -> bool:
        try:
            return httpx.get(self.url + path).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def process(sd3_bundle: Path) -> Any:
    started = Process(sd3_bundle)
    yield started
    started.process.kill()
    started.process.communicate()


def test_sigterm_finishes_what_was_accepted_and_takes_no_more(process: Process) -> None:
    with ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(httpx.post, f"{process.url}/v1/images/generations", json=VERY_LONG, timeout=60)
        running = 'obsdiff_num_requests_running{model="bundle"} 1.0'
        wait_until(lambda: running in httpx.get(f"{process.url}/metrics").text)
        process.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
        refused = httpx.post(f"{process.url}/v1/images/generations", json={"prompt": "b"})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert httpx.get(f"{process.url}/health").status_code == 200
        assert accepted.result().status_code == 200
    assert process.process.wait(20) == 0


def test_a_second_signal_ends_it_at_once(process: Process) -> None:
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(httpx.post, f"{process.url}/v1/images/generations", json=ENDLESS, timeout=60)
        running = 'obsdiff_num_requests_running{model="bundle"} 1.0'
        wait_until(lambda: running in httpx.get(f"{process.url}/metrics").text)
        process.process.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 503)
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(5) == 130
        with pytest.raises((httpx.TransportError, AssertionError)):
            assert answer.result().status_code == 200


def test_killed_it_leaves_its_port_free(process: Process, sd3_bundle: Path) -> None:
    os.kill(process.process.pid, signal.SIGKILL)
    process.process.wait(5)
    run._bound("127.0.0.1", int(process.url.rpartition(":")[2])).close()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen at 127"):
        run.serve([str(tmp_path / "nothing")], Options(port=taken.getsockname()[1]))


def test_connections_are_taken_once_the_address_is_told(sd3_bundle: Path) -> None:
    class EnoughError(Exception):
        pass

    def come_at_once(url: str) -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            raise EnoughError

    with pytest.raises(EnoughError):
        run.serve([str(sd3_bundle)], Options(port=0, threads=1), come_at_once)


def test_two_bundles_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two models are called x"):
        run.named([str(tmp_path / "x"), f"x={tmp_path}"])
    assert list(run.named(["a=b/c", "d"])) == ["a", "d"]


def test_keys_come_from_a_file_that_holds_some(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    assert options.read_keys(path) == ("one", "two")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        options.read_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        options.read_keys(tmp_path / "none")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'obsdiff\[serve\]'"):
        run.serve([str(tmp_path)], Options())


def test_threads_end_with_the_server(start: Any) -> None:
    running = start()
    running.close()
    assert not [thread for thread in threading.enumerate() if thread is running.batcher._thread]
