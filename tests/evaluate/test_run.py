import asyncio

import pytest

from openmint.errors import EngineFailed
from openmint.evaluate.run import MAX_ASKED_AT_ONCE, Progress, run_task
from openmint.evaluate.task import EvaluationItem, parse_task

TASK = parse_task(
    {
        "name": "sums",
        "scorer": "number",
        "items": [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(100)],
    }
)


def test_counts_right_answers_and_bounds_what_is_in_flight() -> None:
    in_flight, most_in_flight = 0, 0

    async def ask(index: int, item: EvaluationItem) -> str:
        nonlocal in_flight, most_in_flight
        in_flight += 1
        most_in_flight = max(most_in_flight, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        return item.answer if index % 4 else "0"

    progress = Progress(num_items=100)
    asyncio.run(run_task(TASK, ask, progress))
    assert (progress.num_done, progress.num_right, progress.score) == (100, 75, 0.75)
    assert most_in_flight == MAX_ASKED_AT_ONCE
    low, high = progress.interval
    assert low < 0.75 < high


def test_only_the_first_n_items_are_asked() -> None:
    asked = []

    async def ask(index: int, item: EvaluationItem) -> str:
        asked.append(index)
        return ""

    asyncio.run(run_task(TASK, ask, Progress(num_items=3)))
    assert sorted(asked) == [0, 1, 2]


def test_a_failure_ends_the_run_and_cancels_the_rest() -> None:
    cancelled = 0

    async def ask(index: int, item: EvaluationItem) -> str:
        nonlocal cancelled
        if index == 1:
            raise EngineFailed("worker died")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        return ""

    with pytest.raises(EngineFailed):
        asyncio.run(run_task(TASK, ask, Progress(num_items=10)))
    assert cancelled == 9
