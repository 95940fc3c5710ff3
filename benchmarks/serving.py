"""A server under load: are all answers right, what does batching bring, how long does /health take, does memory grow?

    python benchmarks/serving.py out                 a bundle; on two cores some minutes

Serves the bundle from a process of its own, as `obsdiff serve` does. Every answer is compared with the image that the
same server draws alone for that prompt and seed. Throughput with batching and one at a time (`--max-rows 2`) is
measured in turns. Prints a table; asserts nothing about time.
"""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

PROMPTS = ("a large red circle above a small blue square", "a small green triangle", "a blue star")
HEALTH_EVERY_S = 0.02


class Server:
    """`obsdiff serve` of one bundle."""

    def __init__(self, bundle: Path, max_rows: int) -> None:
        command = [
            sys.executable,
            "-m",
            "obsdiff",
            "serve",
            str(bundle),
            "--port",
            "0",
            "--max-queue",
            "10000",
            "--json",
        ]
        self._process = subprocess.Popen(
            [*command, "--max-rows", str(max_rows)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.url = json.loads(self._process.stdout.readline())["url"]

    def draw(self, index: int, steps: int) -> NDArray[np.uint8]:
        """The image of request `index`."""
        asked = {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index, "num_inference_steps": steps}
        request = urllib.request.Request(
            f"{self.url}/v1/images/generations", json.dumps(asked).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            data = json.load(answer)["data"][0]["b64_json"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))

    def resident_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@contextmanager
def health_times(server: Server) -> Iterator[list[float]]:
    """Seconds that /health takes, asked again and again meanwhile."""
    found: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(HEALTH_EVERY_S):
            started = time.perf_counter()
            with urllib.request.urlopen(f"{server.url}/health", timeout=60) as answer:
                answer.read()
            found.append(time.perf_counter() - started)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def load(server: Server, count: int, clients: int, steps: int) -> tuple[list[NDArray[np.uint8]], float]:
    """The images of that many requests, and the seconds of all."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        images = list(pool.map(lambda index: server.draw(index, steps), range(count)))
    return images, time.perf_counter() - started


def main(
    bundle: Annotated[Path, typer.Argument(help="What is served.")],
    requests: Annotated[int, typer.Option(help="Of one measurement.")] = 200,
    clients: Annotated[int, typer.Option(help="At once.")] = 32,
    steps: Annotated[int, typer.Option(help="Of an image.")] = 20,
    rows: Annotated[int, typer.Option(help="Of a batched run.")] = 16,
    rounds: Annotated[int, typer.Option(help="Of both, in turns.")] = 3,
    lasting: Annotated[int, typer.Option(help="Requests after which memory is looked at again.")] = 1000,
) -> None:
    batched, single = Server(bundle, rows), Server(bundle, 2)
    try:
        alone = [batched.draw(index, steps) for index in range(requests)]
        seconds: dict[str, list[float]] = {"batched": [], "one at a time": []}
        wrong = 0
        for _ in range(rounds):
            images, took = load(batched, requests, clients, steps)
            seconds["batched"].append(took)
            wrong += sum(not np.array_equal(image, other) for image, other in zip(images, alone, strict=True))
            furthest = max(
                int(np.abs(image.astype(int) - other.astype(int)).max())
                for image, other in zip(images, alone, strict=True)
            )
            seconds["one at a time"].append(load(single, requests, clients, steps)[1])
        before = batched.resident_bytes()
        with health_times(batched) as health:  # not above, for to ask takes time from one of the two
            load(batched, lasting, clients, 4)
        after = batched.resident_bytes()
    finally:
        batched.close()
        single.close()
    table = Table("", "measured", title=f"{bundle}, {os.cpu_count()} cores, {clients} clients, {steps} steps")
    for name, values in seconds.items():
        table.add_row(f"images/s, {name}", ", ".join(f"{requests / value:.1f}" for value in values))
    ratios = [one / many for many, one in zip(*seconds.values(), strict=True)]
    table.add_row("batched / one at a time", ", ".join(f"{ratio:.2f}" for ratio in ratios))
    table.add_row(
        "answers that differ from those alone", f"{wrong} of {rounds * requests}, by {furthest} of 255 at most"
    )
    p50, p99 = np.percentile(np.array(health) * 1e3, [50, 99])
    table.add_row("/health under that load", f"{p50:.1f} ms in the middle, {p99:.1f} ms p99, {len(health)} times")
    table.add_row(f"memory before and after {lasting} more", f"{before / 2**20:.0f}, {after / 2**20:.0f} MiB")
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
