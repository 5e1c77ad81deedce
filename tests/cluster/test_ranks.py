"""A worker whose base is divided: several processes that answer, and end, as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from openmint.cluster.process import WorkerProcess, start_worker
from openmint.config import Settings, WorkerConfig
from openmint.errors import EngineFailed, InvalidRequest, NotFound
from openmint.scheduler.work import (
    CreateRun,
    ExportRun,
    OptimWork,
    RestoreRun,
    SampleWork,
    SaveRun,
    ScoreWork,
)
from openmint.types import AdamParams, Digest, FloatArray, LoraSpec, RunId, SamplingParams, Tenant
from tests.workbench import prompt_of, train_work

T, RUN, AGAIN = Tenant("t"), RunId("r"), RunId("again")
SPEC = LoraSpec(4)
ADAM = AdamParams(learning_rate=1e-2, eps=1e-5)
RANKS = {"tensor_parallel": 2, "expert_parallel": 2}
DIVIDED = {"layers": RANKS, "data": {"data_parallel": 2}}


@pytest.fixture(scope="module")
def base(tiny_base: Callable[[str], Path]) -> Path:
    return tiny_base("qwen3-moe")


@asynccontextmanager
async def running(base: Path, data: Path, **worker: Any) -> AsyncIterator[WorkerProcess]:
    config = WorkerConfig(dtype="float32", threads=1, kv_cache_bytes=2**22, **worker)
    started = await start_worker(str(base), Settings(data=data, worker=config))
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            started.process.kill()
        await started.process.wait()
        await asyncio.wait({started.client._pump})


@dataclass(frozen=True)
class Answers:
    losses: list[float]
    grad_norms: list[float]
    tokens: list[list[int]]
    scores: FloatArray
    revisions: list[Digest]


async def answers(worker: WorkerProcess) -> Answers:
    """Of a run that is trained, updated, exported, scored, saved, restored and sampled."""
    call = worker.client.call
    await call(CreateRun(RUN, T, SPEC, 0))
    works = [train_work(RUN, "cross_entropy", (7, 19), seed) for seed in range(2)]
    trained = await asyncio.gather(*(call(work) for work in works))
    updates = [await call(OptimWork(RUN, T, ADAM, seq=3))]
    exported = await call(ExportRun(RUN, T, keep_resident=True))
    scored = await call(ScoreWork(T, exported.digest, prompt_of(9)))
    saved = await call(SaveRun(RUN, T))
    await call(RestoreRun(AGAIN, T, saved.digest, "training", True))
    trained.append(await call(train_work(AGAIN, "cross_entropy", (5,), 9)))
    updates.append(await call(OptimWork(AGAIN, T, ADAM, seq=2)))
    later = await call(ExportRun(AGAIN, T, keep_resident=False))
    with pytest.raises(NotFound, match="'nowhere' is not in memory"):
        await call(train_work(RunId("nowhere"), "cross_entropy", (7,), 0))
    asked = [SamplingParams(6, heat, seed=2) for heat in (0.0, 1.0)]
    named = None, exported.digest, later.digest
    works = [
        SampleWork(T, revision, prompt_of(9), params) for revision in named for params in asked
    ]
    drawn = await asyncio.gather(*(call(work) for work in works))
    return Answers(
        losses=[each.metrics["loss:sum"] for each in trained],
        grad_norms=[each.metrics["grad_norm:max"] for each in updates],
        tokens=[each.sequences[0].tokens_N.tolist() for each in drawn],
        scores=scored.logprobs_T,
        revisions=[exported.digest, later.digest],
    )


def others_of(worker: WorkerProcess) -> list[psutil.Process]:
    """The processes of its other ranks."""
    return psutil.Process(worker.process.pid).children()


async def ended(processes: list[psutil.Process]) -> bool:
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=10)
    return not alive


def test_two_ranks_answer_as_one_does(base: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with running(base, tmp_path / "one") as worker:
            assert not others_of(worker)
            one = await answers(worker)
        for name, config in DIVIDED.items():
            async with running(base, tmp_path / name, **config) as worker:
                assert len(others_of(worker)) == 1
                two = await answers(worker)
            assert two.losses == pytest.approx(one.losses, rel=1e-5)
            assert two.grad_norms == pytest.approx(one.grad_norms, rel=1e-4)
            assert two.tokens == one.tokens
            np.testing.assert_allclose(two.scores, one.scores, atol=1e-4)

    asyncio.run(check())


def test_ranks_end_together_and_what_was_logged_is_made_again(base: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with running(base, tmp_path, **RANKS) as worker:
            expected = await answers(worker)
            (other,) = others_of(worker)
            lost = asyncio.ensure_future(
                worker.client.call(train_work(RUN, "cross_entropy", (300,) * 20, 1))
            )
            await asyncio.sleep(0.3)
            other.kill()
            with pytest.raises(EngineFailed):
                await lost
            assert await asyncio.wait_for(worker.process.wait(), 10) == 1
        async with running(base, tmp_path, **RANKS) as worker:
            assert worker.ready.logged[RUN] == (3,)
            await worker.client.call(CreateRun(RUN, T, SPEC, 0))
            again = OptimWork(RUN, T, ADAM, seq=3, is_acknowledged=True)
            assert (await worker.client.call(again)).num_optim_steps == 1
            made = await worker.client.call(ExportRun(RUN, T, keep_resident=False))
            assert made.digest == expected.revisions[0]
            (stopped,) = others_of(worker)
            stopped.suspend()
            worker.process.kill()
            assert await ended([stopped])

    asyncio.run(check())


def test_a_division_that_cannot_be_is_refused_by_all_ranks(base: Path, tmp_path: Path) -> None:
    async def check() -> None:
        with pytest.raises(EngineFailed, match="2 heads of keys and values can't be divided"):
            async with running(base, tmp_path, tensor_parallel=4):
                pass

    before = set(psutil.Process().children(recursive=True))  # a service of other tests has some
    asyncio.run(check())
    children = set(psutil.Process().children(recursive=True)) - before
    assert not [p for p in children if "openmint.cluster" in " ".join(p.cmdline())]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_parallel": 2, "expert_parallel": 4}, "must be equal"),
        ({"tensor_parallel": 2, "data_parallel": 2}, "can't be above 1 together"),
        ({"data_parallel": 0}, "at least 1"),
    ],
)
def test_divisions_that_do_not_go_together_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        WorkerConfig(**given)
