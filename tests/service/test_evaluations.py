"""Evaluations: started off the event loop, few at a time, and never left as running."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Evaluation
from openmint.errors import Overloaded, StoreFailed
from openmint.evaluate.task import parse_task
from openmint.service import evaluations as module
from openmint.service.evaluations import (
    MAX_RUNNING_PER_TENANT,
    EvaluationRequest,
    Evaluations,
)
from openmint.types import Tenant

ANN = Tenant("ann")
TASK = {"name": "sums", "scorer": "number", "items": [{"prompt": "2+2=", "answer": 4}]}
REQUEST = EvaluationRequest("tiny", TASK, None, 0, 0.0)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    yield catalog
    catalog.close()


class RightAnswers:
    """Completions on a bare base that always says 4."""

    def __init__(self) -> None:
        target = SimpleNamespace(revision=None, policy=None, base=SimpleNamespace(name="tiny"))
        self.targets = SimpleNamespace(resolve=lambda tenant, model: target)

    async def admit_prompts(self, *_: object) -> Any:
        async def answer() -> Any:
            return [SimpleNamespace(text="4")], None

        return SimpleNamespace(whole=answer)


class Expected:
    """Prewarming that only remembers whom it was told of."""

    def __init__(self) -> None:
        self.targets: list[Any] = []

    def before_evaluation(self, tenant: Tenant, target: Any) -> None:
        assert tenant == ANN
        self.targets.append(target)


@pytest.fixture
def evaluations(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    monkeypatch.setattr(module, "REWRITE_SECONDS", 0.0)
    return Evaluations(catalog, RightAnswers(), Expected())  # type: ignore[arg-type]


async def ended(evaluations: Evaluations, started: Evaluation) -> Evaluation:
    while True:
        record, progress = evaluations.get(ANN, started.evaluation_id)
        if progress is None:
            return record
        await asyncio.sleep(0.01)


async def test_a_task_is_parsed_while_the_event_loop_goes_on(
    evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_went_on = threading.Event()

    def slow_parse(raw: object) -> Any:
        assert loop_went_on.wait(2.0), "parsing held the event loop"
        return parse_task(raw)

    monkeypatch.setattr(module, "parse_task", slow_parse)
    storing = asyncio.create_task(evaluations.store_task(ANN, TASK))
    starting = asyncio.create_task(evaluations.start(ANN, REQUEST))
    await asyncio.sleep(0)
    loop_went_on.set()
    assert (await storing).name == "sums"
    assert (await ended(evaluations, await starting)).status == "finished"


async def test_no_more_run_than_allowed_however_fast_they_come(evaluations: Evaluations) -> None:
    asked = [evaluations.start(ANN, REQUEST) for _ in range(MAX_RUNNING_PER_TENANT + 3)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    started = [outcome for outcome in outcomes if isinstance(outcome, Evaluation)]
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 3
    for one in started:
        await ended(evaluations, one)
    again = await evaluations.start(ANN, REQUEST)
    assert (await ended(evaluations, again)).status == "finished"


async def test_a_refused_start_takes_no_place(evaluations: Evaluations) -> None:
    unknown = EvaluationRequest("tiny", "unknown", None, 0, 0.0)
    for _ in range(MAX_RUNNING_PER_TENANT + 1):
        with pytest.raises(Exception, match="no evaluation task"):
            await evaluations.start(ANN, unknown)


async def test_what_will_be_sampled_is_told_before_the_task_is_looked_at(
    evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluations._prewarming.targets  # type: ignore[attr-defined]
    told: list[int] = []

    def parse(raw: object) -> Any:
        told.append(len(expected))
        return parse_task(raw)

    monkeypatch.setattr(module, "parse_task", parse)
    await ended(evaluations, await evaluations.start(ANN, REQUEST))
    assert told[0] == 1
    evaluations.expect(ANN, "tiny")
    assert expected == [evaluations._completions.targets.resolve(ANN, "tiny")] * 2


@pytest.mark.parametrize(("num_failures", "status"), [(1, "finished"), (2, "failed")])
async def test_a_score_that_cannot_be_written_is_written_again_or_shown_as_a_failure(
    evaluations: Evaluations,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    num_failures: int,
    status: str,
) -> None:
    finish, failures = catalog.finish_evaluation, iter(range(num_failures))

    def flaky(*arguments: Any) -> Evaluation:
        if next(failures, None) is not None:
            raise StoreFailed("disk I/O error")
        return finish(*arguments)

    monkeypatch.setattr(catalog, "finish_evaluation", flaky)
    record = await ended(evaluations, await evaluations.start(ANN, REQUEST))
    assert record.status == status
    if status == "failed":
        assert "1 right, could not be written" in (record.error or "")
