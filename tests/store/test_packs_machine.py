"""Packs under random use by two processes, beside a dictionary: what each of them says must agree
with it, also after one was killed in the middle of a write, or the folder opened anew."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from openmint.errors import NotFound
from openmint.store import packs
from openmint.store.blobs import digest_of
from openmint.store.folder_store import FolderStore
from openmint.store.pack_frames import BLOB, encode_frame
from tests.store.made import raw

WORDS = [word * 20 for word in (b"", b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h")]
words, writers = st.sampled_from(WORDS), st.integers(0, 1)


class TwoWriters(RuleBasedStateMachine):
    """Packs of about four frames."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(packs, "PACK_BYTES", 300)
        for name in ("fsync", "fdatasync"):
            self.patch.setattr(os, name, lambda file: None)
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.stores = [FolderStore(self.root), FolderStore(self.root)]
        self.model: set[bytes] = set()

    def teardown(self) -> None:
        self.stores.clear()
        self.folder.cleanup()
        self.patch.undo()

    @rule(writer=writers, word=words)
    def put(self, writer: int, word: bytes) -> None:
        self.stores[writer].put(word)
        self.model.add(word)

    @rule(writer=writers, several=st.lists(words, max_size=8))
    def put_many(self, writer: int, several: list[bytes]) -> None:
        assert self.stores[writer].put_many(several) == [digest_of(word) for word in several]
        self.model.update(several)

    @rule(writer=writers, several=st.sets(words, max_size=8))
    def delete(self, writer: int, several: set[bytes]) -> None:
        for word in several:
            self.stores[writer].delete(digest_of(word))
        self.model -= several

    @rule(writer=writers)
    def compact(self, writer: int) -> None:
        self.stores[writer].compact()

    @rule(writer=writers)
    def open_again(self, writer: int) -> None:
        self.stores[writer] = FolderStore(self.root)

    @rule(writer=writers, word=words, share=st.floats(0, 1))
    def be_killed(self, writer: int, word: bytes, share: float) -> None:
        """In the middle of a put."""
        own = self.stores[writer]._packs._own
        self.stores[writer] = FolderStore(self.root)
        if own is not None:
            frame = encode_frame(BLOB, raw(digest_of(word)), bytes(8), word)
            with (self.root / "packs" / f"{own.name}.pack").open("ab") as file:
                file.write(frame[: int(share * (len(frame) - 1))])

    @rule(writer=writers, word=words)
    def get(self, writer: int, word: bytes) -> None:
        store, digest = self.stores[writer], digest_of(word)
        if word in self.model:
            assert store.get(digest) == word
            assert store.size(digest) == len(word)
            return
        for ask in (store.get, store.size):
            with pytest.raises(NotFound):
                ask(digest)

    @invariant()
    def each_finds_what_there_is(self) -> None:
        for store in self.stores:
            assert {word for word in WORDS if store.exists(digest_of(word))} == self.model
            assert store._packs.num_damaged_bytes() == 0


TwoWriters.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_two_writers_agree_with_the_model = TwoWriters.TestCase
