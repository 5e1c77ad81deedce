"""The resident bases of this deployment, each behind the clients of its workers."""

from __future__ import annotations

from pathlib import Path

from openmint.cluster.worker_client import WorkerClient
from openmint.errors import NotFound, Overloaded
from openmint.service.routing import Choose, by_residency
from openmint.types import Digest, Tenant


class Workers:
    """Finds the worker of a base, whichever process that is by now.

    The first worker of a base has its training runs, and draws samples; further ones, its replicas,
    draw samples only.
    """

    def __init__(self, num_bases: int, choose: Choose = by_residency) -> None:
        """`num_bases` will be resident; until then what is asked may be what is still loading."""
        self._num_bases, self._choose = num_bases, choose
        self._by_name: dict[str, WorkerClient] = {}
        self._replicas: dict[Digest, dict[int, WorkerClient]] = {}

    def add(self, client: WorkerClient) -> None:
        """Its base is resident; a client that is here already stays."""
        if client.replica:
            self._replicas.setdefault(client.base.digest, {})[client.replica] = client
        else:
            self._by_name[client.base.name] = client

    def first(self) -> tuple[WorkerClient, ...]:
        """The first worker of each base."""
        return tuple(self._by_name.values())

    def all(self) -> tuple[WorkerClient, ...]:
        replicas = [client for each in self._replicas.values() for client in each.values()]
        return (*self.first(), *replicas)

    def states(self) -> dict[str, str]:
        """Of each worker `ready`, or what keeps it from being of use."""
        return {client.name: _state(client) for client in self.all()}

    def sampled_revisions(self, tenant: Tenant) -> set[Digest]:
        """Those that samples of the tenant run on or wait for, on any base."""
        return set().union(*(client.sampled_revisions(tenant) for client in self.all()))

    def tiers_of(self, base: Digest, revision: Digest) -> list[str]:
        """Where a revision's bytes are beside the store, as of about a second ago."""
        stats = [client.stats for client in self.all() if client.base.digest == base]
        in_host = any(revision in each.resident_revisions for each in stats)
        in_slot = any(revision in each.slot_revisions for each in stats)
        return ["host"] * in_host + ["slot"] * in_slot

    def to_sample(self, base: Digest, revision: Digest | None) -> WorkerClient:
        """The worker that is to draw samples of this revision now. Raises as `by_name` does."""
        clients = [self.by_digest(base), *self._replicas.get(base, {}).values()]
        if len(clients) == 1:
            return clients[0]
        return self._choose([client for client in clients if client.alive] or clients, revision)

    def by_name(self, name: str) -> WorkerClient:
        """The worker of a base given by its name, its directory or its directory's last part.

        Raises NotFound, naming the resident bases; Overloaded while some are still loading.
        """
        if client := self._by_name.get(name):
            return client
        for client in self._by_name.values():
            if name in (client.base.directory, Path(client.base.directory).name):
                return client
        self._check_loaded()
        raise NotFound(f"no resident base is called {name!r}; resident: {self._resident()}")

    def by_digest(self, digest: Digest) -> WorkerClient:
        """The worker whose base has this digest. Raises as `by_name` does."""
        for client in self._by_name.values():
            if client.base.digest == digest:
                return client
        self._check_loaded()
        raise NotFound(f"no resident base has digest {digest}; resident: {self._resident()}")

    def _check_loaded(self) -> None:
        if (num_missing := self._num_bases - len(self._by_name)) > 0:
            raise Overloaded(f"{num_missing} of {self._num_bases} bases are still loading; retry")

    def _resident(self) -> str:
        return ", ".join(sorted(self._by_name)) or "none"


def _state(client: WorkerClient) -> str:
    if not client.alive:
        return "down"
    return "ready" if client.stats.journal_is_sound else "journal failed"
