"""Starting and stopping worker processes on this machine."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from openmint.cluster.link import frame, read_frame
from openmint.cluster.worker_client import WorkerClient
from openmint.cluster.worker_setup import WorkerSetup
from openmint.config import Settings
from openmint.errors import EngineFailed
from openmint.scheduler.work import Failed, Ready
from openmint.types import BaseInfo

STOP_SECONDS = 30.0
MEMORY_ENVIRONMENT = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
    "MALLOC_MMAP_THRESHOLD_": str(2**21),
    "MALLOC_TRIM_THRESHOLD_": str(2**21),
    "MALLOC_ARENA_MAX": "2",
}
"""Keeps a CPU worker's memory flat. Each new batch length makes kernels, of which oneDNN and the
layer above it would keep 1024 each, and blocks that malloc would rather keep than reuse, an arena
for every lane: 3.1 GB after the quick demo, 2.0 GB with these. 2 MiB keep a small model's
activations off fresh pages (docs/performance.md). The environment of `serve` wins."""


class WorkerProcess:
    """A running worker and the client of its link."""

    def __init__(
        self, process: asyncio.subprocess.Process, client: WorkerClient, ready: Ready
    ) -> None:
        self.process = process
        self.client = client
        self.ready = ready

    @property
    def base(self) -> BaseInfo:
        return self.client.base

    async def stop(self) -> None:
        """Let the worker finish its queue, then end it; after 30 s it is killed."""
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.client.drain()
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def start_worker(
    base: str, settings: Settings, client: WorkerClient | None = None
) -> WorkerProcess:
    """A worker whose base is resident; behind the client of the one that it succeeds, if given, and
    then its replica.

    Raises EngineFailed that says why when it can't be.
    """
    ours, theirs = socket.socketpair()
    client = client or WorkerClient()
    num_workers = max(1, len(settings.bases) * settings.replicas)
    threads = settings.worker.threads or max(1, (os.cpu_count() or 1) // num_workers)
    environment = {
        **MEMORY_ENVIRONMENT,
        # Threads that spin while they wait starve every other busy process: beside two of them,
        # decode ran at 7 to 49 tokens/s spinning and at 98 to 141 sleeping (2 cores).
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "openmint.cluster.worker",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            env=environment,
        )
    reader, writer = await asyncio.open_connection(sock=ours, limit=2**20)
    setup = WorkerSetup(
        base, settings.data, settings.store_url, settings.worker, threads, client.replica
    )
    writer.write(frame(setup))
    try:
        answer = await read_frame(reader)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
        code = await process.wait()
        raise EngineFailed(
            f"the worker of base {base!r} ended with code {code} before the base was resident; "
            "its log says why"
        ) from None
    except asyncio.CancelledError:
        writer.close()
        process.kill()
        raise
    if isinstance(answer, Failed):
        writer.close()
        await process.wait()
        raise EngineFailed(f"base {base!r} could not be loaded: {answer.error}")
    assert isinstance(answer, Ready)
    client.connect(reader, writer, answer)
    return WorkerProcess(process, client, answer)
