"""schemathesis over the server's own description of its API: whatever it sends, no answer is a 5xx."""

from __future__ import annotations

import httpx
import schemathesis
from hypothesis import HealthCheck, settings

from tests.serve.conftest import ServerProcess


def test_no_request_makes_the_server_fail(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    seen: dict[int, int] = {}
    for operation in schema.get_all_operations():
        api = operation.ok()

        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and "completions" in case.path:
                # Valid requests would otherwise generate for as long as the context allows.
                case.body = {**case.body, "timeout": 0.2, "stream": False}
            answer = case.call(base_url=server.url, timeout=30)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (case.method, case.path, answer.text[:300])

        import hypothesis

        hypothesis.given(case=api.as_strategy())(check)()
    assert seen.get(200, 0) > 5
    assert seen.get(400, 0) > 5
