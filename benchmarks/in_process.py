"""A worker's scheduler and engine in this process: submit commands, run steps, look at answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np

from openmint.config import WorkerConfig
from openmint.engine.engine import Engine
from openmint.journal.update_log import NoLog
from openmint.residency.decisions import NoDecisions
from openmint.scheduler.scheduler import Scheduler
from openmint.scheduler.seams import Archive
from openmint.scheduler.work import Command, Done, Failed, Submit, ToGateway
from openmint.types import Datum, Digest, IntArray, Tenant

DIGEST = Digest("sha256:" + "0" * 64)
TENANT = Tenant("benchmark")


class InProcess:
    """Only the seams that a worker uses are touched. What a worker does in the background is done
    at once; its end is heard of before the next step."""

    def __init__(self, engine: Engine, archive: Archive, config: WorkerConfig) -> None:
        self.engine = engine
        self._answers: dict[int, Any] = {}
        self._ended: list[Callable[[], None]] = []
        self._work_ids = count(1)
        self.scheduler = Scheduler(
            engine,
            archive,
            NoLog(),
            NoDecisions(),
            config,
            lambda tokens: "",
            self._receive,
            self._background,
        )

    def submit(self, command: Command) -> int:
        work_id = next(self._work_ids)
        self.scheduler.submit(Submit(work_id, command))
        return work_id

    def steps(self) -> Iterator[None]:
        """Run until nothing is queued, step by step."""
        while not self.scheduler.is_idle:
            while self._ended:
                self._ended.pop(0)()
            self.scheduler.step()
            yield

    def is_done(self, work_id: int) -> bool:
        return work_id in self._answers

    def result(self, work_id: int) -> Any:
        """What came of a command. Raises its error."""
        answer = self._answers.pop(work_id)
        if isinstance(answer, Failed):
            raise answer.error
        return answer.result

    def do(self, command: Command) -> Any:
        work_id = self.submit(command)
        for _ in self.steps():
            pass
        return self.result(work_id)

    def _receive(self, message: ToGateway) -> None:
        if isinstance(message, Done | Failed):
            self._answers[message.work_id] = message

    def _background(
        self, job: Callable[[], Any], then: Callable[[Any, Exception | None], None]
    ) -> None:
        try:
            value, error = job(), None
        except Exception as failure:  # the scheduler hears of it, as it does in a worker
            value, error = None, failure
        self._ended.append(lambda: then(value, error))


def next_tokens(row_N1: IntArray) -> Datum:
    """Every token of the row predicts the next one, all with weight one."""
    weights = np.ones(len(row_N1) - 1, dtype=np.float32)
    return Datum(row_N1[:-1], {"target_tokens": row_N1[1:], "weights": weights})
