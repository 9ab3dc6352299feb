"""Nothing that its description allows, and nothing beside it, makes the API fail."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)
from synthetic_runs import OPTIMIZER, dense, healthy, manifest, new_run

RUN = "f" * 32
EXAMPLES = 5
CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance)
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_no_request_makes_the_collector_fail(own_collector):
    run = msgspec.structs.replace(new_run(config={"lr": 0.1}), id=RUN)
    own_collector.store(run, [manifest(dense(3)), *healthy(range(20), 3)])
    schema = schemathesis.openapi.from_url(f"{own_collector.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:
        for mode in GenerationMode:
            # What takes nothing cannot be given anything wrong.
            with contextlib.suppress(Unsatisfiable):
                _attack(operation, mode, own_collector.token)
    assert own_collector.get(f"/api/v1/runs/{RUN}").status == 200


def _attack(operation: Any, mode: GenerationMode, token: str) -> None:
    @FUZZ
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def send(case: Any, known: bool) -> None:
        if known and case.method != "DELETE" and "run" in (case.path_parameters or {}):
            # What is not there answers 404 before anything else is looked at.
            case.path_parameters["run"] = RUN
            if isinstance(case.query, dict) and "optimizer" in case.query:
                case.query["optimizer"] = OPTIMIZER
        answer = case.call(headers={"Authorization": f"Bearer {token}"})
        case.validate_response(answer, checks=CHECKS)

    send()
