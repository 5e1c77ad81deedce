"""Schedules at work: what is due is started once, waits for room, and gives up on what can't be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openmint.catalog.catalog import Catalog
from openmint.errors import NotFound, OpenMintError, Overloaded
from openmint.service.evaluations import EvaluationRequest
from openmint.service.schedules import Schedules
from openmint.types import Tenant
from tests.catalog.made import ANN, RUN, add_run, blob, digest_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Started:
    """Evaluations that only remember what was asked, or refuse."""

    def __init__(self) -> None:
        self.requests: list[EvaluationRequest] = []
        self.expected: list[str] = []
        self.error: OpenMintError | None = None

    def expect(self, tenant: Tenant, model: str) -> None:
        assert tenant == ANN
        self.expected.append(model)

    async def start(self, tenant: Tenant, request: EvaluationRequest) -> Any:
        assert tenant == ANN
        if self.error:
            raise self.error
        self.requests.append(request)
        return type("Record", (), {"evaluation_id": len(self.requests)})


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """Policy `math` with one revision, and a schedule for each new one."""
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    add_run(catalog)
    catalog.put_task(ANN, "sums", digest_of("sums"), {"items": [1]})
    catalog.add_checkpoint(ANN, RUN, "sampler_weights", "one", blob(1))
    catalog.add_schedule(ANN, "math", "latest", "sums", every_hours=None, num_items=5, actor="ann")
    yield catalog
    catalog.close()


async def test_a_new_revision_is_evaluated_once(catalog: Catalog) -> None:
    started = Started()
    schedules = Schedules(catalog, started)  # type: ignore[arg-type]
    for _ in range(2):
        await schedules.start_due()
    assert started.requests == [EvaluationRequest(f"ann/math@{digest_of(1)}", "sums", 5, 0, 0.0)]


async def test_what_finds_no_room_is_started_later(catalog: Catalog) -> None:
    started = Started()
    schedules = Schedules(catalog, started)  # type: ignore[arg-type]
    started.error = Overloaded("four run")
    catalog.add_schedule(ANN, "math", "latest", "sums", every_hours=1, num_items=5, actor="ann")
    await schedules.start_due()
    assert started.expected == [f"ann/math@{digest_of(1)}"]  # one at a time, however many wait
    started.error = None
    await schedules.start_due()
    assert (len(started.requests), len(started.expected)) == (2, 1)


async def test_what_cannot_be_is_not_tried_for_ever(catalog: Catalog) -> None:
    started = Started()
    schedules = Schedules(catalog, started)  # type: ignore[arg-type]
    started.error = NotFound("no such task")
    await schedules.start_due()
    started.error = None
    await schedules.start_due()
    assert started.requests == []
