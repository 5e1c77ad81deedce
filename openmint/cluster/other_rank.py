"""The process of a rank that isn't a worker's first: it repeats the first one's engine calls.

`python -m openmint.cluster.other_rank FD` is started by `ranks.py`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import signal
import socket
import sys
import threading

import torch

from openmint.cluster.ranks import RankSetup
from openmint.cluster.worker import NICENESS, Link
from openmint.engine.engine import Engine
from openmint.engine.together import Call, FollowingEngine
from openmint.errors import OpenMintError
from openmint.models.loader import divide, load_model
from openmint.observe.logs import configure_logs

PARENT_DEATH_SIGNAL = 1
"""Linux's `PR_SET_PDEATHSIG`."""


def main(connection: socket.socket) -> None:
    """Load this rank's part of the base, then repeat calls until the first rank is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # a rank that was stopped would never see the end of its link
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    link = Link(connection)
    setup: RankSetup = link.receive()
    calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(link, calls), name="link", daemon=True).start()
    os.nice(NICENESS)
    configure_logs()
    torch.set_num_threads(setup.threads)
    engine = _load(setup)
    gc.collect()
    gc.freeze()
    while True:
        engine.repeat(calls.get())


def _pump(link: Link, calls: queue.SimpleQueue[Call]) -> None:
    while (call := link.receive()) is not None:
        calls.put(call)
    os._exit(0)  # the first rank is gone, and this one may wait for it in a collective


def _load(setup: RankSetup) -> FollowingEngine:
    division = divide(setup.config, setup.rank, setup.meeting, setup.first_device)
    try:
        model, base = load_model(setup.name, setup.directory, setup.digest, setup.config, division)
    except OpenMintError:
        threading.Event().wait()  # the first rank has met the same, and says so before it ends
        raise
    return FollowingEngine(Engine(model, base, setup.config))


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
