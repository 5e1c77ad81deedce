"""One worker process: a base, its engine and its scheduler, behind a socket to the gateway.

Three kinds of thread: the main one owns engine and scheduler; a reader feeds its inbox; a few
others read and write the store. `python -m openmint.cluster.worker FD` is started by `process.py`.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from openmint.cluster.link import HEADER, frame
from openmint.cluster.ranks import OtherRanks, give_up
from openmint.cluster.worker_client import STATS_SECONDS
from openmint.cluster.worker_setup import WorkerSetup
from openmint.engine.engine import Engine
from openmint.engine.formats import AdapterArchive
from openmint.engine.together import LeadingEngine
from openmint.errors import EngineFailed, OpenMintError
from openmint.journal.update_log import NoLog, UpdateLog, folder_of
from openmint.models.embedded import EMBEDDED_BASE, base_digest, resolve_base
from openmint.models.loader import divide, load_model
from openmint.observe.logs import configure_logs
from openmint.residency.decisions import DecisionLog, path_of, recall
from openmint.scheduler.scheduler import Scheduler
from openmint.scheduler.work import (
    Cancel,
    Drain,
    Failed,
    Forget,
    Hold,
    Ready,
    Submit,
    ToGateway,
    ToWorker,
)
from openmint.store.opening import open_store
from openmint.types import Digest

STORE_THREADS = 2
"""At least; else as many as loads may run at once, and one for what is guessed."""
NICENESS = 5
"""The engine's threads fill all cores for long at a time, so they let the gateway go first: beside
63 others a request then waited 7 ms for gateway, link and scheduler, not 9 (two cores). Niceness is
a thread's own on Linux, and the reader, which is older, keeps its place: 9.2 ms, not 10.1."""


class Link:
    """The worker's end of the socket; frames as in `worker_client.py`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def send(self, message: ToGateway) -> None:
        self._connection.sendall(frame(message))

    def receive(self) -> Any:
        """The next message, None when the gateway has gone."""
        header = self._stream.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        (length,) = HEADER.unpack(header)
        body = self._stream.read(length)
        return pickle.loads(body) if len(body) == length else None


class Inbox:
    """What the main loop has to look at: messages of the gateway and ends of background jobs."""

    def __init__(self, num_threads: int) -> None:
        self._queue: queue.SimpleQueue[ToWorker | Callable[[], None] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="store")

    def read_from(self, link: Link) -> None:
        def pump() -> None:
            while (message := link.receive()) is not None:
                if isinstance(message, Submit):
                    message = replace(message, received_at_seconds=time.monotonic())
                self._queue.put(message)
            self._queue.put(None)

        threading.Thread(target=pump, name="link", daemon=True).start()

    def post(self, call: Callable[[], None]) -> None:
        """Have it called by the main loop."""
        self._queue.put(call)

    def background(
        self, job: Callable[[], Any], then: Callable[[Any, Exception | None], None]
    ) -> None:
        def ended(future: Future[Any]) -> None:
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            value = None if error is not None else future.result()
            self._queue.put(lambda: then(value, error))

        self._pool.submit(job).add_done_callback(ended)

    def get(self, timeout_seconds: float) -> list[ToWorker | Callable[[], None] | None]:
        """Everything that has come; waits up to the timeout for a first item."""
        items = []
        try:
            items.append(
                self._queue.get(timeout=timeout_seconds)
                if timeout_seconds
                else self._queue.get_nowait()
            )
            while True:
                items.append(self._queue.get_nowait())
        except queue.Empty:
            return items


def main(connection: socket.socket) -> None:
    """Load the base, say Ready, then serve until drained or until the gateway is gone."""
    # The gateway decides when workers end: a Ctrl-C in a terminal reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(connection)
    setup: WorkerSetup = link.receive()
    inbox = Inbox(max(STORE_THREADS, setup.config.parallel_loads + 1))
    inbox.read_from(link)
    os.nice(NICENESS)
    configure_logs()
    torch.set_num_threads(setup.threads)
    try:
        scheduler, ready = load(setup, link, inbox)
    except OpenMintError as error:
        link.send(Failed(0, error))
        return
    except Exception as error:  # the process's edge: the gateway must hear why
        link.send(Failed(0, EngineFailed(f"{type(error).__name__}: {error}")))
        raise
    # What stays for good needn't be looked at again: a full collection took 0.17 s.
    gc.collect()
    gc.freeze()
    link.send(ready)
    serve(scheduler, inbox, link)


def load(setup: WorkerSetup, link: Link, inbox: Inbox) -> tuple[Scheduler, Ready]:
    """A scheduler over the resident base, and what to say of it.

    Raises InvalidRequest for a folder that isn't one, StoreFailed when there is no journal."""
    directory = resolve_base(setup.base, setup.data)
    digest = base_digest(directory, setup.data)
    name = setup.base if setup.base == EMBEDDED_BASE else directory.name
    engine = make_engine(setup, name, directory, digest)
    base = engine.base
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    archive = AdapterArchive(open_store(setup.store_url, setup.data), base)
    updates: UpdateLog | NoLog = NoLog()
    if not setup.replica:
        folder = folder_of(setup.data, digest)
        updates = UpdateLog(folder, digest, inbox.post, setup.config.updates_per_sync)
    asked = path_of(setup.data, digest, setup.replica)
    past = recall(asked)
    decisions = DecisionLog(asked, setup.config.host_bytes)
    scheduler = Scheduler(
        engine,
        archive,
        updates,
        decisions,
        setup.config,
        lambda tokens: str(tokenizer.decode(tokens)),
        link.send,
        inbox.background,
    )
    scheduler.recall(past)
    return scheduler, Ready(base, updates.epoch, updates.whole())


def make_engine(
    setup: WorkerSetup, name: str, directory: Path, digest: Digest
) -> Engine | LeadingEngine:
    """The engine over the resident base; where the base is divided this process is its first rank,
    and the other ranks are started. Raises InvalidRequest for a folder that isn't a base."""
    if setup.config.num_ranks == 1:
        return Engine(*load_model(name, directory, digest, setup.config), setup.config)
    others = OtherRanks(setup, name, directory, digest)
    torch.set_num_threads(others.threads)
    division = divide(setup.config, 0, others.meeting, others.first_device)
    model, base = load_model(name, directory, digest, setup.config, division)
    return LeadingEngine(Engine(model, base, setup.config), others.tell, give_up)


def serve(scheduler: Scheduler, inbox: Inbox, link: Link) -> None:
    """The main loop: take in what came, do one step, repeat."""
    draining, busy, next_stats = False, False, 0.0
    while not (draining and scheduler.is_idle):
        for item in inbox.get(0.0 if busy else STATS_SECONDS):
            match item:
                case Submit():
                    scheduler.submit(item)
                case Cancel():
                    scheduler.cancel(item)
                case Forget():
                    scheduler.forget_updates(item)
                case Hold():
                    scheduler.hold(item)
                case Drain():
                    draining = True
                    scheduler.stop_guessing()
                case None:
                    return  # the gateway has gone, and with it everyone who waits for a result
                case _:
                    item()
        busy = scheduler.step()
        if (now := time.monotonic()) >= next_stats:
            link.send(scheduler.stats())
            next_stats = now + STATS_SECONDS


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # skip the teardown of torch's thread pools, which can hang
