"""A real worker process: started, asked, cancelled, killed, drained."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmint.cluster.process import WorkerProcess, start_worker
from openmint.config import Settings, WorkerConfig
from openmint.errors import EngineFailed, InvalidRequest, NotFound
from openmint.scheduler.work import (
    CreateRun,
    ExportRun,
    OptimWork,
    SampleDelta,
    SampleResult,
    SampleWork,
    SavedBlob,
    TrainResult,
    WorkerStats,
)
from openmint.store.folder_store import FolderStore
from openmint.types import AdamParams, LoraSpec, RunId, SamplingParams, Tenant
from tests.workbench import prompt_of, train_work

T, RUN = Tenant("t"), RunId("r")


@pytest.fixture(scope="module")
def base(tiny_base: Callable[[str], Path]) -> Path:
    return tiny_base("qwen3")


def settings(data: Path, **worker: Any) -> Settings:
    config = WorkerConfig(
        dtype="float32", threads=1, kv_cache_bytes=2**22, **{"step_tokens": 64, **worker}
    )
    return Settings(data=data, worker=config)


@asynccontextmanager
async def running(base: Path, data: Path) -> AsyncIterator[WorkerProcess]:
    worker = await start_worker(str(base), settings(data))
    try:
        yield worker
    finally:
        if worker.process.returncode is None:
            with suppress(ProcessLookupError):
                worker.process.kill()
        await worker.process.wait()
        await asyncio.wait({worker.client._pump})


def sample_work(seed: int = 0, max_tokens: int = 6, **more: Any) -> SampleWork:
    params = SamplingParams(max_tokens, seed=seed)
    return SampleWork(T, None, prompt_of(9, seed), params, **more)


async def stats_when(worker: WorkerProcess, holds: Callable[[WorkerStats], bool]) -> WorkerStats:
    async with asyncio.timeout(20):
        while not holds(worker.client.stats):  # noqa: ASYNC110 - they come by themselves
            await asyncio.sleep(0.05)
    return worker.client.stats


async def check_use(worker: WorkerProcess, data: Path) -> None:
    """Training, export, sampling from the export, errors, streams: all through the link."""
    client = worker.client
    assert worker.base.architecture == "Qwen3ForCausalLM"
    await client.call(CreateRun(RUN, T, LoraSpec(4), 0))
    calls = [client.call(train_work(RUN, "cross_entropy", (7, 9), seed)) for seed in range(3)]
    optim = client.call(OptimWork(RUN, T, AdamParams(learning_rate=1e-2)))
    *trained, update = await asyncio.gather(*calls, optim)
    assert all(isinstance(result, TrainResult) for result in trained)
    assert update.num_optim_steps == 1
    saved = await client.call(ExportRun(RUN, T, keep_resident=True))
    assert isinstance(saved, SavedBlob)
    assert FolderStore(data).size(saved.digest) == saved.size_bytes
    params = SamplingParams(5, temperature=0.0)
    result = await client.call(SampleWork(T, saved.digest, prompt_of(9), params))
    assert isinstance(result, SampleResult)
    assert (result.revision, result.base) == (saved.digest, worker.base.digest)
    with pytest.raises(NotFound, match="'nowhere' is not in memory"):
        await client.call(train_work(RunId("nowhere"), "cross_entropy", (7,), 0))
    with pytest.raises(InvalidRequest, match="Shorten one of them"):
        await client.call(sample_work(max_tokens=10_000))


async def check_concurrency(worker: WorkerProcess) -> None:
    client = worker.client
    alone = [await client.call(sample_work(seed)) for seed in range(12)]
    together = await asyncio.gather(*(client.call(sample_work(seed)) for seed in range(12)))
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, SampleResult)
        assert isinstance(other, SampleResult)
        np.testing.assert_array_equal(one.sequences[0].tokens_N, other.sequences[0].tokens_N)
    assert not client._waiting


async def check_streams(worker: WorkerProcess) -> None:
    async def collect(seed: int) -> None:
        *deltas, result = [item async for item in worker.client.stream(work(seed))]
        assert isinstance(result, SampleResult)
        tokens: list[int] = []
        for delta in deltas:
            assert isinstance(delta, SampleDelta)
            tokens += delta.tokens
        assert tokens == list(result.sequences[0].tokens_N)

    def work(seed: int) -> SampleWork:
        return sample_work(seed, max_tokens=20, stream=True)

    await asyncio.gather(*(collect(seed) for seed in range(6)))
    assert not worker.client._waiting


async def check_cancellation(worker: WorkerProcess) -> None:
    await stats_when(worker, lambda s: s.kv_pages_used == 0)
    tasks = [
        asyncio.create_task(worker.client.call(sample_work(i, max_tokens=450))) for i in range(6)
    ]
    await stats_when(worker, lambda s: s.kv_pages_used > 0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    stream = worker.client.stream(sample_work(7, max_tokens=450, stream=True))
    assert isinstance(await anext(stream), SampleDelta)
    await stream.aclose()  # type: ignore[attr-defined]
    stats = await stats_when(worker, lambda s: s.kv_pages_used == 0)
    assert (stats.num_running_sequences, stats.num_waiting_sequences) == (0, 0)
    assert stats.generated_tokens < 7 * 450
    assert isinstance(await worker.client.call(sample_work()), SampleResult)


async def check_drain(worker: WorkerProcess) -> None:
    queued = [
        asyncio.create_task(worker.client.call(sample_work(i, max_tokens=100))) for i in range(8)
    ]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await worker.stop()
    assert worker.process.returncode == 0
    for task in queued:
        result = await task
        assert isinstance(result, SampleResult)
        assert len(result.sequences[0].tokens_N) == 100
    with pytest.raises(EngineFailed, match="is not running; retry later"):
        await worker.client.call(sample_work())
    await worker.stop()


def test_a_workers_whole_life(base: Path, tmp_path: Path) -> None:
    async def life() -> None:
        async with running(base, tmp_path) as worker:
            await check_use(worker, tmp_path)
            await check_concurrency(worker)
            await check_streams(worker)
            await check_cancellation(worker)
            await check_drain(worker)

    asyncio.run(life())


@pytest.mark.chaos
def test_samples_outlive_a_killed_worker_and_training_does_not(base: Path, tmp_path: Path) -> None:
    works = [sample_work(i, max_tokens=450) for i in range(5)]
    streamed = sample_work(9, max_tokens=450, stream=True)

    async def life() -> None:
        async with running(base, tmp_path) as worker:
            client = worker.client
            expected = [await client.call(work) for work in (*works, streamed)]
            await client.call(CreateRun(RUN, T, LoraSpec(2), 0))
            tasks = [asyncio.create_task(client.call(work)) for work in works]
            work = train_work(RUN, "cross_entropy", (400,) * 40, 0)
            training = asyncio.create_task(client.call(work))
            stream, tokens = client.stream(streamed), list[int]()
            tokens += (await anext(stream)).tokens
            killed_at = time.monotonic()
            os.kill(worker.process.pid, signal.SIGKILL)
            with pytest.raises(EngineFailed, match="stopped while this was running"):
                await training
            assert time.monotonic() - killed_at < 5.0
            assert not client.alive
            with pytest.raises(EngineFailed, match="is not running"):
                await client.call(OptimWork(RUN, T, AdamParams()))
            late = asyncio.create_task(client.call(works[0]))
            successor = await start_worker(str(base), settings(tmp_path), client)
            async for piece in stream:
                if isinstance(piece, SampleDelta):
                    tokens += piece.tokens
            found = [await task for task in tasks]
            for own, whole in zip(found, expected, strict=False):
                assert tokens_of(own) == tokens_of(whole)
            assert tokens == tokens_of(expected[-1])
            assert tokens_of(await late) == tokens_of(expected[0])
            await successor.stop()
            with pytest.raises(EngineFailed, match="is not running"):
                await client.call(works[0])

    asyncio.run(life())


def tokens_of(result: object) -> list[int]:
    assert isinstance(result, SampleResult)
    tokens: list[int] = result.sequences[0].tokens_N.tolist()
    return tokens


def test_a_base_that_cannot_be_loaded_says_why(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [(tmp_path / "missing", "missing"), (empty, "config.json")]

    async def starts() -> None:
        for folder, reason in cases:
            with pytest.raises(EngineFailed, match=f"could not be loaded: .*{reason}"):
                await start_worker(str(folder), settings(tmp_path))
        with pytest.raises(EngineFailed, match=r"could not be loaded: .*worker\.dtype 'int4'"):
            wrong = Settings(data=tmp_path, worker=WorkerConfig(dtype="int4", threads=1))
            await start_worker(str(base), wrong)

    asyncio.run(starts())


def test_a_start_that_is_cancelled_leaves_no_process(base: Path, tmp_path: Path) -> None:
    async def start_and_cancel() -> list[int]:
        task = asyncio.create_task(start_worker(str(base), settings(tmp_path)))
        async with asyncio.timeout(20):
            while not (found := children()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            while set(found) & set(children()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return found

    assert asyncio.run(start_and_cancel())


def children() -> list[int]:
    """Live child processes of this one that run a worker."""
    import psutil

    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            if "openmint.cluster.worker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found
