"""Who is drawn when, with whom, and what one that fails does to the others; by a pipeline that only counts."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from obsdiff_runtime.errors import CancelledError, ConfigError, RunError
from obsdiff_runtime.server.batcher import Batcher
from obsdiff_runtime.server.options import Limits
from obsdiff_runtime.server.orders import (
    BusyError,
    Drawn,
    Event,
    Failed,
    Finished,
    LateError,
    Order,
    Previewed,
    Stepped,
    Ticket,
)


class Counted:
    """A drawing that is nothing but a count of its steps."""

    def __init__(self, name: str, calls: int, rows: int, shape: str) -> None:
        self.name, self.calls, self.rows, self.shapes = name, calls, rows, shape
        self.index, self.error = 0, None
        self.sample = np.zeros((1, 1, 1), np.float32)

    @property
    def is_over(self) -> bool:
        return self.index == self.calls or self.error is not None


class Pipeline:
    """Steps wait for `go`, where it is given, so that a test decides what happens between them."""

    def __init__(self) -> None:
        self.companies: list[list[str]] = []
        self.broken: set[str] = set()
        self.gate: threading.Semaphore | None = None
        self.begun = threading.Event()

    def begin(self, name: str, calls: int = 2, rows: int = 2, shape: str = "a", images: int = 1) -> list[Counted]:
        if name == "refused":
            raise ConfigError("no such size")
        self.begun.set()
        return [Counted(name, calls, rows, shape) for _ in range(images)]

    def step(self, drawings: Sequence[Any]) -> None:
        if self.gate is not None:
            self.gate.acquire()
        names = [drawing.name for drawing in drawings]
        self.companies.append(names)
        if self.broken & set(names):
            raise RunError("the engine failed")
        for drawing in drawings:
            drawing.index += 1

    def decode(self, sample: np.ndarray) -> np.ndarray:
        return np.zeros((2, 2, 3), np.uint8)


class Heard:
    """The events of one order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    @property
    def last(self) -> Event:
        assert self.ended.wait(10), self.events
        return self.events[-1]

    @property
    def error(self) -> Exception:
        assert isinstance(self.last, Failed)
        return self.last.error


Made = tuple[Batcher, Pipeline]
Make = Callable[..., Made]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Batcher] = []

    def build(**limits: int) -> Made:
        pipeline = Pipeline()
        made.append(Batcher(pipeline, Limits(**limits)))  # type: ignore[arg-type]
        return made[-1], pipeline

    yield build
    for batcher in made:
        batcher.stop()


def order(batcher: Batcher, name: str, **more: Any) -> tuple[Heard, Ticket]:
    heard = Heard()
    previews, deadline = more.pop("previews", 0), more.pop("deadline_s", 60.0)
    call = {"name": name, **more}
    images, rows = more.get("images", 1), more.get("rows", 2)
    found = Order(call=call, images=images, rows=images * rows, previews=previews, deadline_s=deadline)
    return heard, batcher.submit(found, heard)


def held(batcher: Batcher, pipeline: Pipeline) -> tuple[Heard, Ticket]:
    """An order that waits before its first step."""
    pipeline.gate = threading.Semaphore(0)
    found = order(batcher, "first", calls=3)
    assert pipeline.begun.wait(5)
    return found


def let(pipeline: Pipeline, steps: int = 1000) -> None:
    assert pipeline.gate is not None
    pipeline.gate.release(steps)


def test_an_order_is_stepped_decoded_and_finished(make: Make) -> None:
    batcher, _ = make()
    heard, _ = order(batcher, "one", images=2)
    assert isinstance(heard.last, Finished)
    assert [type(event) for event in heard.events] == [Stepped, Stepped, Drawn, Drawn, Finished]
    assert set(heard.last.seconds) == {"queue", "text", "denoise", "decode"}
    assert batcher.is_idle


def test_a_new_order_joins_a_running_one_at_its_own_first_step(make: Make) -> None:
    batcher, pipeline = make()
    first, _ = held(batcher, pipeline)
    second, _ = order(batcher, "second", calls=3)
    let(pipeline)
    assert isinstance(first.last, Finished)
    assert isinstance(second.last, Finished)
    assert pipeline.companies == [["first"], ["first", "second"], ["first", "second"], ["second"]]


def test_other_shapes_take_turns_and_too_many_rows_are_split(make: Make) -> None:
    batcher, pipeline = make(max_rows=6)
    first, _ = held(batcher, pipeline)
    others = [order(batcher, "wide", shape="b")[0], order(batcher, "third")[0], order(batcher, "late")[0]]
    let(pipeline)
    assert all(isinstance(heard.last, Finished) for heard in (first, *others))
    assert pipeline.companies[1:3] == [["first", "third"], ["wide"]]
    large, _ = order(batcher, "large", images=5)
    assert isinstance(large.last, Finished)
    assert pipeline.companies[-4:] == [["large"] * 3, ["large"] * 2] * 2


def test_orders_wait_for_room_and_are_begun_in_turn(make: Make) -> None:
    batcher, pipeline = make(max_rows=4)
    held(batcher, pipeline)
    waiting = [order(batcher, name)[0] for name in ("second", "third")]
    assert batcher.waiting == 2
    let(pipeline)
    assert all(isinstance(heard.last, Finished) for heard in waiting)
    assert ["first", "second", "third"] not in [sorted(company) for company in pipeline.companies]


def test_a_full_queue_refuses_and_says_when_to_come_again(make: Make) -> None:
    batcher, pipeline = make(max_rows=2, max_waiting=1)
    held(batcher, pipeline)
    order(batcher, "second")
    with pytest.raises(BusyError, match=r"queue is full \(1 waiting\); try again in \d+ s") as refused:
        order(batcher, "third")
    assert refused.value.retry_after_s >= 1
    let(pipeline)


def test_one_that_cannot_begin_fails_alone(make: Make) -> None:
    batcher, pipeline = make()
    first, _ = held(batcher, pipeline)
    refused, _ = order(batcher, "refused")
    let(pipeline)
    assert isinstance(refused.error, ConfigError)
    assert isinstance(first.last, Finished)


def test_a_run_that_fails_is_repeated_one_by_one(make: Make) -> None:
    batcher, pipeline = make()
    first, _ = held(batcher, pipeline)
    bad, _ = order(batcher, "bad")
    pipeline.broken = {"bad"}
    let(pipeline)
    assert isinstance(bad.error, RunError)
    assert isinstance(first.last, Finished)
    assert pipeline.companies[1:4] == [["first", "bad"], ["first"], ["bad"]]


def test_a_cancelled_order_leaves_between_two_steps(make: Make) -> None:
    batcher, pipeline = make()
    heard, ticket = held(batcher, pipeline)
    ticket.cancel()
    let(pipeline)
    assert isinstance(heard.error, CancelledError)
    assert len(pipeline.companies) == 1


def test_a_cancelled_order_that_waits_is_never_begun(make: Make) -> None:
    batcher, pipeline = make(max_rows=2)
    held(batcher, pipeline)
    heard, ticket = order(batcher, "second")
    ticket.cancel()
    let(pipeline)
    assert isinstance(heard.error, CancelledError)
    assert all("second" not in company for company in pipeline.companies)


def test_a_deadline_ends_an_order(make: Make) -> None:
    batcher, pipeline = make()
    pipeline.gate = threading.Semaphore(0)
    heard, _ = order(batcher, "late", deadline_s=0.05)
    time.sleep(0.1)
    let(pipeline)
    assert isinstance(heard.error, LateError)


def test_previews_lie_evenly_between_the_steps(make: Make) -> None:
    batcher, _ = make()
    heard, _ = order(batcher, "one", calls=8, previews=3)
    assert isinstance(heard.last, Finished)
    before = [
        sum(isinstance(each, Stepped) for each in heard.events[:place])
        for place, event in enumerate(heard.events)
        if isinstance(event, Previewed)
    ]
    assert before == [2, 4, 6]


def test_closed_it_takes_no_more_and_finishes_what_it_has(make: Make) -> None:
    batcher, pipeline = make()
    heard, _ = held(batcher, pipeline)
    batcher.close()
    with pytest.raises(BusyError, match="shutting down"):
        order(batcher, "second")
    let(pipeline)
    assert isinstance(heard.last, Finished)


def test_stopped_it_fails_what_is_left(make: Make) -> None:
    batcher, pipeline = make(max_rows=2)
    running, _ = held(batcher, pipeline)
    waiting, _ = order(batcher, "second")
    stopper = threading.Thread(target=batcher.stop)
    stopper.start()
    time.sleep(0.05)
    let(pipeline)
    stopper.join()
    assert isinstance(waiting.error, BusyError)
    assert isinstance(running.error, BusyError)
    assert not batcher.is_alive
