"""The description of the API, and everything that schemathesis makes of it."""

import shutil
from pathlib import Path

import pytest
import schemathesis
from schemathesis.engine.core import Engine
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from schemathesis.schemas import BaseSchema

from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.http.auth import RIGHTS, Tokens, add_token
from tests.serving.servers import Served


@pytest.fixture(scope="module")
def described(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseSchema:
    run = tmp_path_factory.mktemp("described") / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    path = run.parent / "tokens.json"
    token = add_token(path, "all", RIGHTS, ["*"], S3TRun.open(run).directory.key.pseudonym)
    served = Served(run, Tokens(path))
    schema = schemathesis.openapi.from_asgi("/openapi.json", served.app())
    schema.config.update(headers={"Authorization": f"Bearer {token}"})
    return schema


def problems_of(schema: BaseSchema, examples: int) -> tuple[list[str], set[str]]:
    """What all of its checks find, and which operations were tried."""
    schema.config.generation.update(max_examples=examples, deterministic=True)
    found, tried = [], set()
    for event in Engine(schema).execute():
        if isinstance(event, NonFatalError | FatalError):
            found.append(str(getattr(event, "value", event)))
        if not isinstance(event, ScenarioFinished):
            continue
        tried.add(event.label)
        for name, checks in event.recorder.checks.items():
            for check in checks:
                if check.failure_info is not None:
                    failure = check.failure_info.failure
                    case = event.recorder.cases[name].value
                    sent = f"{case.body!r} {case.query!r} {case.headers!r}"[:500]
                    found.append(
                        f"{event.label}: {check.name}: {failure.title} {failure.message}: {sent}"
                    )
    return found, tried


def test_schemathesis_finds_nothing(described: BaseSchema) -> None:
    """No 5xx, no undocumented status or body, nothing taken that the description forbids or refused
    that it allows, no right without a token, no method too many."""
    found, tried = problems_of(described, examples=5)
    assert not found, "\n\n".join(found[:10])
    assert len(tried & {"POST /v1/completions", "POST /v1/deletions", "GET /metrics"}) == 3


@pytest.mark.slow
def test_schemathesis_finds_nothing_for_long(described: BaseSchema) -> None:
    found, _ = problems_of(described, examples=100)
    assert not found, "\n\n".join(found[:10])


def test_what_is_described(described: BaseSchema) -> None:
    paths = described.raw_schema["paths"]
    assert set(paths) == {
        "/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/models", "/v1/models/{model}",
        "/v1/deletions", "/v1/deletions/{request_id}", "/v1/deletions/{request_id}/certificate",
        "/healthz", "/readyz", "/metrics", "/v1/residue",
    }  # fmt: skip
    for path, operations in paths.items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert path in ("/healthz", "/readyz") or operation["security"]
