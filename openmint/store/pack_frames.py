"""The frames of a pack: a blob each, or the death of a copy of one.

`<4s magic><u32 payload bytes><8s birth><32s SHA-256 of the blob><u32 CRC-32 of all that><payload>`.

A birth is drawn at random when a blob is put, and stays with the copy when compaction moves it. A
death has the digest and the birth of what it ends, and no payload: so it reaches a copy wherever
that was moved to, and never one that was put later. Nobody who hands us bytes can know a birth, so
none can forge a death inside a blob either.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SMALL_BYTES = 256 * 1024
"""Blobs of fewer bytes are packed; a frame that claims more is none."""
BLOB, DEATH = b"OMB1", b"OMD1"
MAGIC = re.compile(rb"OM[BD]1")
HEADER = struct.Struct("<4sI8s32sI")
CHECK_BYTES = 4
SEARCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a frame lies in its pack, and its header."""

    is_death: bool
    birth: bytes
    digest: bytes
    offset: int
    num_bytes: int
    """Of its payload."""

    @property
    def end(self) -> int:
        return self.offset + HEADER.size + self.num_bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes between whole frames, or behind the last one, that are no frame."""

    offset: int
    num_bytes: int
    is_tail: bool
    """Nothing whole follows: a write that did not end, or has not ended yet."""


def encode_frame(magic: bytes, digest: bytes, birth: bytes, payload: bytes = b"") -> bytes:
    head = HEADER.pack(magic, len(payload), birth, digest, 0)[:-CHECK_BYTES]
    return b"".join((head, zlib.crc32(head).to_bytes(CHECK_BYTES, "little"), payload))


def read_frames(
    file: int, offset: int, size: int, *, in_doubt: bool = False
) -> Iterator[Frame | Damage]:
    """What a pack of that size holds from `offset` on, in order, from its headers alone.

    Damage is said once for each run of bytes that is no frame. A sound header whose payload isn't
    all there yet is the end of the pack: what looks like frames behind it would be its payload.

    Behind damage, or `in_doubt` from the begin, what is read may itself be somebody's payload, made
    to look like frames. A header is believed there only if its payload is whole.
    """
    while offset < size:
        frame = _frame_at(file, offset)
        if in_doubt and frame is not None and not _is_whole_within(file, frame, size):
            frame = None
        if frame is None:
            in_doubt = True
            found = _find_frame(file, offset + 1, size)
            end = size if found is None else found
            yield Damage(offset, end - offset, is_tail=found is None)
            offset = end
        elif frame.end > size:
            yield Damage(offset, size - offset, is_tail=True)
            return
        else:
            yield frame
            offset = frame.end


def is_whole(file: int, frame: Frame) -> bool:
    """Whether the frame's payload is what was written."""
    payload = os.pread(file, frame.num_bytes, frame.offset + HEADER.size)
    return frame.is_death or hashlib.sha256(payload).digest() == frame.digest


def is_still_there(file: int, frame: Frame) -> bool:
    """Whether the pack still has this very frame there, and not another that was written since."""
    return _frame_at(file, frame.offset) == frame


def _is_whole_within(file: int, frame: Frame, size: int) -> bool:
    return frame.end <= size and is_whole(file, frame)


def _frame_at(file: int, offset: int) -> Frame | None:
    header = os.pread(file, HEADER.size, offset)
    if len(header) < HEADER.size:
        return None
    magic, num_bytes, birth, digest, check = HEADER.unpack(header)
    if magic not in (BLOB, DEATH) or num_bytes >= SMALL_BYTES:
        return None
    if zlib.crc32(header[:-CHECK_BYTES]) != check:
        return None
    return Frame(magic == DEATH, birth, digest, offset, num_bytes)


def _find_frame(file: int, offset: int, size: int) -> int | None:
    """Where the next whole frame begins, if there is one; its payload is read too."""
    while offset < size:
        # Blocks overlap by what a magic needs, so that none hides on a border.
        block = os.pread(file, SEARCH_BYTES + len(BLOB) - 1, offset)
        for found in MAGIC.finditer(block):
            frame = _frame_at(file, offset + found.start())
            if frame is not None and _is_whole_within(file, frame, size):
                return frame.offset
        offset += SEARCH_BYTES
    return None
