"""Which worker of a base draws a sample, where there are several: by what they have in memory.

A revision in two workers' memories takes the room of two, and is read twice. So a revision stays
where it is until the worker that has it is much busier than another. `sticky` is the common
alternative, for comparison: a hash of the revision alone decides (rendezvous hashing, Thaler and
Ravishankar, 1998).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from openmint.cluster.worker_client import WorkerClient
from openmint.types import Digest

MOST_MORE = 16
"""Samples by which the worker that has a revision may be ahead of the least busy one. A load is a
few milliseconds of waiting, a second copy is a place in memory for good."""

Choose = Callable[[Sequence[WorkerClient], Digest | None], WorkerClient]


def by_residency(clients: Sequence[WorkerClient], revision: Digest | None) -> WorkerClient:
    """The least busy of those that have the revision, unless another is much less so."""
    idlest = min(clients, key=lambda client: (client.num_waiting, -_weight(client, revision)))
    having = [client for client in clients if revision is not None and client.has(revision)]
    if not having:
        return idlest
    best = min(having, key=lambda client: client.num_waiting)
    return best if best.num_waiting <= idlest.num_waiting + MOST_MORE else idlest


def sticky(clients: Sequence[WorkerClient], revision: Digest | None) -> WorkerClient:
    """Always the same worker for a revision while the same workers are alive."""
    return max(clients, key=lambda client: _weight(client, revision))


ROUTINGS: Mapping[str, Choose] = {"residency": by_residency, "sticky": sticky}


def _weight(client: WorkerClient, revision: Digest | None) -> int:
    name = f"{client.replica}:{revision}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
