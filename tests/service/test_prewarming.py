"""Prewarming that nobody waits for: told to the right worker, and never an error."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openmint.errors import NotFound, OpenMintError
from openmint.scheduler.work import Prewarm
from openmint.service.prewarming import Prewarming
from openmint.service.targets import Target
from tests.catalog.made import ANN, digest_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Client:
    def __init__(self, error: OpenMintError | None = None) -> None:
        self.commands: list[Any] = []
        self.error = error

    async def call(self, command: Any) -> None:
        self.commands.append(command)
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, NotFound("it was deleted since")])
async def test_an_evaluation_s_revision_is_loaded_by_the_worker_that_will_draw(
    error: OpenMintError | None,
) -> None:
    client, prewarming = Client(error), Prewarming(None, None)  # type: ignore[arg-type]
    target = Target(client, None, digest_of(1), "ann/math")  # type: ignore[arg-type]
    prewarming.before_evaluation(ANN, target)
    await asyncio.gather(*prewarming._background._tasks)
    assert client.commands == [Prewarm(ANN, digest_of(1), None)]


async def test_a_base_is_not_loaded() -> None:
    prewarming = Prewarming(None, None)  # type: ignore[arg-type]
    prewarming.before_evaluation(ANN, Target(Client(), None, None))  # type: ignore[arg-type]
    assert not prewarming._background._tasks
