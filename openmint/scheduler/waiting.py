"""Sequences that wait for a place: a line for each tenant, first come, first served within it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from openmint.scheduler.sequences import Sequence
from openmint.types import Tenant


class Waiting:
    """The lines. A step looks at as many sequences as it may admit, however many wait."""

    def __init__(self) -> None:
        self._lines: dict[Tenant, OrderedDict[Sequence, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line

    @property
    def tenants(self) -> set[Tenant]:
        """Those with a line."""
        return set(self._lines)

    def of(self, tenant: Tenant) -> list[Sequence]:
        """A copy of a tenant's line, as it stands."""
        return list(self._lines.get(tenant, ()))

    def add(self, sequence: Sequence) -> None:
        self._lines.setdefault(sequence.tenant, OrderedDict())[sequence] = None

    def add_first(self, sequence: Sequence) -> None:
        """Before all others of its tenant."""
        self.add(sequence)
        self._lines[sequence.tenant].move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        line = self._lines[sequence.tenant]
        del line[sequence]
        if not line:
            del self._lines[sequence.tenant]
