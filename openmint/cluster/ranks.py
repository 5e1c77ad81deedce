"""The other ranks of a worker whose base is divided, as its first rank sees them.

They are its children on this machine, each behind a socket pair that carries frames as in
`link.py`: engine calls go down, nothing comes back. One that ends takes the worker with it, and
ends itself when the worker does.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import structlog

from openmint.cluster.link import frame
from openmint.cluster.worker_setup import WorkerSetup
from openmint.config import WorkerConfig
from openmint.types import Digest

log = structlog.get_logger(__name__)

FOLDER = "ranks"
"""In the data folder: where the ranks of a worker find each other."""


@dataclass(frozen=True, slots=True)
class RankSetup:
    """First message to another rank."""

    rank: int
    name: str
    directory: Path
    digest: Digest
    config: WorkerConfig
    threads: int
    meeting: Path
    """A file through which ranks find each other."""
    first_device: int


class OtherRanks:
    """All but the first, started and watched."""

    def __init__(self, setup: WorkerSetup, name: str, directory: Path, digest: Digest) -> None:
        self.meeting = _meeting(setup, digest)
        size = setup.config.num_ranks
        self.first_device = setup.replica * size
        self.threads = max(1, setup.threads // size)
        self._links = []
        for rank in range(1, size):
            given = (name, directory, digest, setup.config, self.threads, self.meeting)
            self._links.append(_start(RankSetup(rank, *given, self.first_device)))

    def tell(self, call: Any) -> None:
        """Have every other rank repeat this call."""
        message = frame(call)
        for link in self._links:
            link.sendall(message)


def give_up(error: Exception) -> NoReturn:
    """End this process, a rank of a worker, at once: the others are in another step by now."""
    log.error("rank.failed", error=f"{type(error).__name__}: {error}")
    os._exit(1)


def _meeting(setup: WorkerSetup, digest: Digest) -> Path:
    """A file that no rank of an earlier worker knows; theirs are gone."""
    folder = setup.data / FOLDER / f"{digest.removeprefix('sha256:')[:16]}-{setup.replica}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    return Path(tempfile.mkdtemp(dir=folder)) / "meeting"


def _start(setup: RankSetup) -> socket.socket:
    """The link to a new rank, which ends this process when it ends."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "openmint.cluster.other_rank", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": str(setup.threads)},
        )

    def watch() -> None:
        code = process.wait()
        log.error("rank.ended", rank=setup.rank, code=code)
        os._exit(1)

    threading.Thread(target=watch, name=f"rank-{setup.rank}", daemon=True).start()
    ours.sendall(frame(setup))
    return ours
