"""Runs a task: asks every item, scores the answers, counts. Knows nothing about models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from openmint.evaluate.interval import wilson_interval
from openmint.evaluate.scorers import is_right
from openmint.evaluate.task import EvaluationItem, EvaluationTask

MAX_ASKED_AT_ONCE = 32
"""Items in flight; they decode together in one batch."""


@dataclass(slots=True)
class Progress:
    """Counts of one evaluation, growing while it runs."""

    num_items: int
    outcomes: dict[int, bool] = field(default_factory=dict)
    """Whether the answer to an item was right, by its index."""

    @property
    def num_done(self) -> int:
        return len(self.outcomes)

    @property
    def num_right(self) -> int:
        return sum(self.outcomes.values())

    @property
    def score(self) -> float:
        """The share of right answers among those given; 0 before the first."""
        return self.num_right / self.num_done if self.num_done else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_right, self.num_done)


async def run_task(
    task: EvaluationTask,
    ask: Callable[[int, EvaluationItem], Awaitable[str]],
    progress: Progress,
) -> None:
    """Ask the task's first `progress.num_items` items and count the right answers.

    The first failure of `ask` ends the run and is raised; the other questions are cancelled.
    """
    room = asyncio.Semaphore(MAX_ASKED_AT_ONCE)

    async def ask_and_score(index: int, item: EvaluationItem) -> None:
        async with room:
            completion = await ask(index, item)
            progress.outcomes[index] = await asyncio.to_thread(
                is_right, task.scorer, completion, item.answer, task.choices
            )

    items = task.items[: progress.num_items]
    asked = [asyncio.ensure_future(ask_and_score(i, item)) for i, item in enumerate(items)]
    try:
        await asyncio.gather(*asked)
    finally:
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
