"""Pieces are zeros on whole cache lines, and share nothing."""

from __future__ import annotations

from openmint.kernels.huge import CHUNK, LINE, HugeMemory


def test_pieces_are_their_takers_alone_on_whole_cache_lines() -> None:
    memory = HugeMemory()
    pieces = [memory.take(num_bytes) for num_bytes in (1, 70, CHUNK - LINE, CHUNK + 3, 5)]
    for value, piece in enumerate(pieces, start=1):
        assert piece.data_ptr() % LINE == 0
        assert not piece.any()
        piece.fill_(value)
    assert [int(piece.unique()) for piece in pieces] == [1, 2, 3, 4, 5]
