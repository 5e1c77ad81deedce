"""What gives a new worker the state of a run: a snapshot, and the requests since then.

An update that is logged is made again from its gradient, so the passes that it used up are left
out: no acknowledged step needs a forward pass (DESIGN.md §6).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from openmint.catalog.records import RequestRecord, SavedState
from openmint.scheduler.work import OptimWork, RestoreRun, RunCommand, TrainWork
from openmint.service.orders import CODEC, LoadOrder, StartOrder
from openmint.types import RunId, Tenant


def past_of(
    run_id: RunId,
    tenant: Tenant,
    rows: Sequence[RequestRecord],
    snapshot: SavedState | None,
    logged: Collection[int],
) -> list[tuple[int, RunCommand]]:
    """Commands under the seq_ids of their requests, in order; those of requests that have no
    outcome yet are not among them.

    `logged` are the requests whose update is in the log. Raises StoreFailed.
    """
    since = -1 if snapshot is None else snapshot.seq
    past: list[tuple[int, RunCommand]] = []
    is_used_up = False
    """Whether a later request took the gradient, or threw it away."""
    for row in reversed(rows):
        if row.seq <= since or row.status == "failed" or row.body is None:
            continue
        order, is_done = CODEC.decode(row.body), row.status == "done"
        match order:
            case OptimWork():
                is_used_up = row.seq in logged
                if is_done:
                    past.append((row.seq, replace(order, seq=row.seq, is_acknowledged=True)))
            case TrainWork() if is_done and not is_used_up:
                past.append((row.seq, order))
            case StartOrder() | LoadOrder() if is_done:
                is_used_up = True
                past.append((row.seq, order.command))
    if snapshot is not None:
        restore = RestoreRun(run_id, tenant, snapshot.digest, "training", optimizer=True)
        past.append((since, restore))
    return past[::-1]


def next_seq_of(rows: Sequence[RequestRecord], snapshot: SavedState | None) -> int:
    """The first seq_id that has neither been sent nor is among the requests that follow those."""
    seqs = {row.seq for row in rows}
    sent = [row.seq for row in rows if row.status != "accepted"]
    next_seq = max([*sent, -1 if snapshot is None else snapshot.seq], default=-1) + 1
    while next_seq in seqs:
        next_seq += 1
    return next_seq
