"""What every test gets: one thread (workers share the cores), no hub, no noise from libraries; Ctrl-C is heard.

And the clock, the GPU and the runner that stand for real ones.
"""

import functools
import gc
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from support_matrix import CELL, SupportMatrix, cells

for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_FAKE_TENSOR_DISPATCH_CACHE": "0",  # it costs small networks a quarter of their capture
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with it ignored


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-families", action="store_true", help="write the table of docs/families.md")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SupportMatrix(config))
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would sort by the number of tests
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, then those of many: so no process is left alone with a long one at the end."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    slow = {path for path, own in files.items() if any(item.get_closest_marker("slow") for item in own)}
    items[:] = [
        item for path in sorted(files, key=lambda each: (each not in slow, -len(files[each]))) for item in files[path]
    ]


def pytest_collection_finish() -> None:
    """Look for garbage less often, and never again in what the imports left: it took a twelfth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.user_properties.extend((CELL, found) for found in cells(item))


class FakeClock:
    """Time that passes only when somebody works; it stands for time.perf_counter."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeGpu:
    """NVML's GPU, which draws `watts` all the time."""

    def __init__(self, clock: FakeClock, *, watts: float | None = 500.0) -> None:
        self.clock, self.watts, self.used = clock, watts, 2**30

    def energy_joules(self) -> float | None:
        return None if self.watts is None else self.watts * self.clock.now

    def used_bytes(self) -> int:
        return self.used

    def vitals(self) -> Any:
        from obsdiff_runtime.nvml import GpuVitals

        return GpuVitals(
            sm_mhz=1980,
            sm_max_mhz=1980,
            memory_mhz=2619,
            memory_max_mhz=2619,
            temperature_c=54,
            power_watts=self.watts,
            power_limit_watts=700.0,
        )


class FakeRunner:
    """A candidate of the benchmark whose calls take what they are told; see `obsdiff_runtime.benchmark.runner.Runner`.

    Of a call 10 % are the text encoder's, 30 % each of two denoiser runs, 10 % the decoder's, and 20 % nobody's.
    """

    def __init__(
        self,
        clock: FakeClock,
        name: str,
        seconds: Iterable[float],
        *,
        gpu: FakeGpu | None = None,
        takes_bytes: int = 0,
        memory: Any = None,
        dtype: str = "float32",
        refuses: str = "",
    ) -> None:
        self.clock, self.name, self.seconds = clock, name, iter(seconds)
        self.gpu, self.takes_bytes, self.memory, self.dtype, self.refuses = gpu, takes_bytes, memory, dtype, refuses
        self.calls = 0

    @property
    def subject(self) -> Any:
        from obsdiff_runtime.benchmark.runner import Subject

        return Subject(
            name=self.name, kind="fake", path=f"/fakes/{self.name}", backend="fake", sparsity="2:4", stored_bytes=10**6
        )

    @property
    def defaults(self) -> Any:
        from obsdiff_runtime.bundle import Defaults

        return Defaults(height=8, width=16, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=None)

    example = "a fake"

    def check(self, request: Any) -> None:
        from obsdiff_runtime.errors import ConfigError

        if self.refuses:
            raise ConfigError(self.refuses)

    def load(self, request: Any) -> Any:
        from obsdiff_runtime.benchmark.runner import Loaded

        if self.gpu is not None:
            self.gpu.used += self.takes_bytes
        self.clock.now += 7.0
        return Loaded(
            load_seconds={"transformer": 5.0},
            first_image_seconds=2.0,
            devices={"transformer": "CPU" if self.gpu is None else "GPU"},
            dtype=self.dtype,
            gpu=None if self.gpu is None else 0,
            versions={"fake": "1.0"},
        )

    def draw(self, request: Any) -> Any:
        import numpy as np

        from obsdiff_runtime.benchmark.runner import Drawn

        self.calls += 1
        took = next(self.seconds)
        self.clock.now += took
        return Drawn(
            pictures=np.zeros((request.num_images, request.height, request.width, 3), np.uint8),
            components={
                "text_encoder": [0.1 * took],
                "transformer": [0.3 * took, 0.3 * took],
                "vae_decoder": [0.1 * took],
            },
            first_step_seconds=0.45 * took,
            stages={"text": 0.15 * took, "denoise": 0.72 * took, "decode": 0.13 * took},
        )

    def device_memory(self) -> Any:
        return self.memory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    found = FakeClock()
    monkeypatch.setattr("time.perf_counter", found)
    return found


@pytest.fixture
def fake_runner(clock: FakeClock) -> Callable[..., FakeRunner]:
    """fake_runner(name, seconds, **options): a candidate on that clock."""
    return functools.partial(FakeRunner, clock)


@pytest.fixture
def fake_gpu(clock: FakeClock) -> Callable[..., FakeGpu]:
    return functools.partial(FakeGpu, clock)
