"""Several ranks on this machine, each a process with one thread, over gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from openmint.layers import ranks
from openmint.layers.ranks import Division, Ranks

FORMS = {
    "tensor": ("tensor",),
    "experts": ("experts",),
    "both": ("tensor", "experts"),
    "data": ("data",),
}


def on_ranks(
    job: Callable[..., Any], folder: Path, *args: Any, size: int = 2, seconds: float = 240.0
) -> list[Any]:
    """What `job(ranks, *args)` returned on each rank. Raises the first failure; nothing outlives
    the call."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        given = (theirs, rank, size, folder / "meeting", job, args)
        processes.append(context.Process(target=_run, args=given, daemon=True))
        ends.append(ours)
    try:
        for process in processes:
            process.start()
        found = [_heard(end, seconds) for end in ends]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for rank, (is_done, value) in enumerate(found):
        assert is_done, f"rank {rank}: {value}"
    return [value for _, value in found]


def division(own: Ranks, form: str) -> Division:
    """`tensor`, `experts`, `both` of them, or `data`."""
    return Division(
        **dict.fromkeys(FORMS[form], own),
    )


def _run(
    end: Connection, rank: int, size: int, meeting: Path, job: Callable[..., Any], args: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    ranks.PATIENCE_SECONDS = 30.0
    try:
        answer = True, job(ranks.meet(rank, size, meeting, "cpu"), *args)
    except Exception:
        answer = False, traceback.format_exc()
    # As plain bytes: torch would share a tensor's memory, which ends with its process.
    end.send_bytes(pickle.dumps(answer))


def _heard(end: Connection, seconds: float) -> tuple[bool, Any]:
    if not end.poll(seconds):
        return False, f"nothing in {seconds} seconds"
    try:
        answer: tuple[bool, Any] = pickle.loads(end.recv_bytes())
    except EOFError:
        return False, "it died"
    return answer
