"""Requests made from the OpenAPI schema, right and wrong: no answer without an error's shape, none that hangs.

OBSDIFF_FUZZ=2000 makes that many; the suite makes a few.
"""

import io
import os
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
REQUESTS = int(os.environ.get("OBSDIFF_FUZZ", "60"))


def pictures() -> strategies.SearchStrategy[bytes]:
    """Bytes, and files of pictures, some of them cut off."""
    file = io.BytesIO()
    Image.fromarray(np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)).save(file, "png")
    whole = file.getvalue()
    cut = strategies.integers(0, len(whole)).map(lambda length: whole[:length])
    return strategies.binary(max_size=64) | strategies.just(whole) | cut


@strategies.composite
def cases(draw: strategies.DrawFn, operation: Any, mode: Any) -> Any:
    try:
        return draw(operation.as_strategy(generation_mode=mode))
    except ValueError as error:  # schemathesis cannot tell whether a form is wrong in which it moved a file
        if "'Binary'" not in str(error):
            raise
        hypothesis.reject()


@pytest.fixture(scope="module")
def api(flux2_pair: tuple[Any, Path], serving: Any) -> Any:
    from obsdiff_runtime.server.options import Bounds

    schemathesis.openapi.format("binary", pictures())
    with serving(flux2_pair[1], bounds=Bounds(steps=5, pixels=48 * 48)) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("path", ["generations", "edits"])
def test_requests_by_the_schema_are_answered_by_the_schema(path: str, mode: str, api: Any) -> None:
    operation = api[f"/v1/images/{path}"]["POST"]
    unfit = [checks.positive_data_acceptance]  # a server has bounds of its own
    if path == "edits":
        unfit.append(checks.negative_data_rejection)  # a number in the place of text is text in a form

    @hypothesis.settings(
        max_examples=REQUESTS // 2,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=True,
        database=None,
    )
    @hypothesis.given(case=cases(operation, schemathesis.GenerationMode[mode]))
    def check(case: Any) -> None:
        answer = case.call(timeout=30)
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, excluded_checks=unfit)

    check()
