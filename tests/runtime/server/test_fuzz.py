"""Requests made from the OpenAPI schema, right and wrong: no answer without an error's shape, none that hangs.

OBSDIFF_FUZZ=2000 makes that many; the suite makes a few.
"""

import os
from typing import Any

import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
REQUESTS = int(os.environ.get("OBSDIFF_FUZZ", "60"))


@pytest.fixture(scope="module")
def api(sd3_bundle: Any, serving: Any) -> Any:
    from obsdiff_runtime.server.options import Bounds

    with serving(sd3_bundle, bounds=Bounds(steps=5, pixels=48 * 48)) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json")


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_requests_by_the_schema_are_answered_by_the_schema(mode: str, api: Any) -> None:
    operation = api["/v1/images/generations"]["POST"]

    @hypothesis.settings(
        max_examples=REQUESTS // 2,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=True,
        database=None,
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def check(case: Any) -> None:
        answer = case.call(timeout=30)
        assert answer.status_code != 500, answer.text
        case.validate_response(
            answer, excluded_checks=[checks.positive_data_acceptance]
        )  # a server has bounds of its own

    check()
