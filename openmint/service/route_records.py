"""What sampled sequences chose on their way through the model, until their training asks for it.

A Tinker client sends tokens back, and nothing that says where it has them from; so records are
found by content: by the tokens from the first on, of the same tenant and base. Kept in memory,
within a limit; the one that was used or made longest ago leaves first. Lives on the event loop.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openmint.scheduler.work import SampleResult, SampleWork
from openmint.types import Digest, IntArray, RecordedRoutes, Tenant

BLOCK = 16
"""A key for each so many tokens, and one for all of a sequence."""
MOST_ALIKE = 256
"""Newest records that are looked through where several begin alike."""
ENTRY_BYTES = 256
"""About what an entry takes beside its record and its keys."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    tokens_N: IntArray
    record: bytes
    keys: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.record) + self.tokens_N.nbytes + ENTRY_BYTES + 96 * len(self.keys)


class RouteRecords:
    """The newest records."""

    def __init__(self, limit_bytes: int) -> None:
        """With a limit of 0 nothing is kept."""
        self._limit_bytes = limit_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._by_key: dict[bytes, OrderedDict[int, Entry]] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    def sampled(self, base: Digest, work: SampleWork, result: SampleResult) -> None:
        """Keep what the result's sequences chose."""
        for sequence in result.sequences:
            if sequence.routes:
                # The last token was drawn and not computed any more.
                tokens_N = np.concatenate([work.prompt_T, sequence.tokens_N])[:-1]
                self._keep(work.tenant, base, tokens_N, sequence.routes)

    def find(self, tenant: Tenant, base: Digest, tokens_N: IntArray) -> RecordedRoutes | None:
        """The newest of the records that have most of these tokens, from the first on."""
        for key in reversed([*_keys(tenant, base, tokens_N)]):
            best, length = None, 0
            for number, entry in reversed(self._by_key.get(key, {}).items()):
                if (alike := _num_alike(entry.tokens_N, tokens_N)) > length:
                    best, length = number, alike
            if best is not None:
                self._entries.move_to_end(best)
                return RecordedRoutes(self._entries[best].record, length)
        return None

    def _keep(self, tenant: Tenant, base: Digest, tokens_N: IntArray, record: bytes) -> None:
        entry = Entry(tokens_N, record, tuple(_keys(tenant, base, tokens_N)))
        if entry.num_bytes > self._limit_bytes:
            return
        self._next_id += 1
        self._entries[self._next_id] = entry
        self.used_bytes += entry.num_bytes
        for key in entry.keys:
            alike = self._by_key.setdefault(key, OrderedDict())
            alike[self._next_id] = entry
            if len(alike) > MOST_ALIKE:
                alike.popitem(last=False)
        while self.used_bytes > self._limit_bytes:
            self._drop(*self._entries.popitem(last=False))

    def _drop(self, number: int, entry: Entry) -> None:
        self.used_bytes -= entry.num_bytes
        for key in entry.keys:
            alike = self._by_key[key]
            alike.pop(number, None)
            if not alike:
                del self._by_key[key]


def _keys(tenant: Tenant, base: Digest, tokens_N: IntArray) -> Iterator[bytes]:
    """Of the first tokens, shorter beginnings first."""
    state = hashlib.blake2b(f"{tenant}|{base}|".encode(), digest_size=16)
    stops = [*range(BLOCK, len(tokens_N), BLOCK), len(tokens_N)]
    start = 0
    for stop in stops:
        state.update(np.ascontiguousarray(tokens_N[start:stop], np.int64).tobytes())
        start = stop
        yield state.copy().digest()


def _num_alike(ones_N: IntArray, others_N: IntArray) -> int:
    """Tokens that both have from the first on."""
    length = min(len(ones_N), len(others_N))
    differs = np.flatnonzero(ones_N[:length] != others_N[:length])
    return int(differs[0]) if len(differs) else length
