"""What Prometheus scrapes, by model: how many wait and run, how long the stages take, what was drawn and refused."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from obsdiff_runtime.gpus import find_gpus

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
ROWS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        model = ["model"]
        self._running = Gauge("obsdiff_num_requests_running", "Requests under way", model, registry=registry)
        self._waiting = Gauge("obsdiff_num_requests_waiting", "Requests that wait", model, registry=registry)
        self._requests = Counter("obsdiff_requests", "Answers, by status", [*model, "status"], registry=registry)
        self._rejections = Counter("obsdiff_rejections", "Refusals, by reason", [*model, "reason"], registry=registry)
        self._images = Counter("obsdiff_images", "Images drawn", model, registry=registry)
        self._steps = Counter("obsdiff_steps", "Runs of the denoiser", model, registry=registry)
        self._rows = Histogram("obsdiff_batch_rows", "Rows of a denoiser run", model, buckets=ROWS, registry=registry)
        self._stages = Histogram(
            "obsdiff_stage_seconds", "Of one run", [*model, "stage"], buckets=SECONDS, registry=registry
        )
        self._latency = Histogram(
            "obsdiff_request_latency_seconds", "From request to answer", model, buckets=SECONDS, registry=registry
        )
        gpus = find_gpus().devices
        if gpus and gpus[0].free_bytes is not None:
            memory = Gauge("obsdiff_gpu_memory_used_bytes", "Of the first GPU, by all programs", registry=registry)
            memory.set_function(_used_bytes)

    def of(self, model: str) -> "ModelMetrics":
        return ModelMetrics(self, model)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """Those of one model; it is what its batcher tells of its runs (batcher.Watch)."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Asks these whenever it is scraped."""
        self._metrics._running.labels(self._model).set_function(running)
        self._metrics._waiting.labels(self._model).set_function(waiting)

    def ran(self, stage: str, seconds: float, rows: int) -> None:
        self._metrics._stages.labels(self._model, stage).observe(seconds)
        if stage == "denoise":
            self._metrics._steps.labels(self._model).inc()
            self._metrics._rows.labels(self._model).observe(rows)

    def answered(self, status: int, seconds: float, images: int) -> None:
        self._metrics._requests.labels(self._model, str(status)).inc()
        self._metrics._latency.labels(self._model).observe(seconds)
        self._metrics._images.labels(self._model).inc(images)

    def rejected(self, reason: str) -> None:
        self._metrics._rejections.labels(self._model, reason).inc()


def _used_bytes() -> float:
    find_gpus.cache_clear()
    first = find_gpus().devices[0]
    return float(first.memory_bytes - (first.free_bytes or 0))
