"""The frames of a log file, each whole or recognisably not: what is cut off, what is damaged.

`<4s magic><u32 head bytes><u64 body bytes><16s digest of body><head: JSON><16s digest of all that>
<body>`. Digests are the first 16 bytes of SHA-256, which this generation of CPUs computes in
hardware. A reader needs the heads alone to know what a file holds.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"OMJ1"
PREFIX = struct.Struct("<4sIQ16s")
DIGEST_BYTES = 16
MAX_HEAD_BYTES = 64 * 1024
SEARCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a frame lies in its file, and its head."""

    head: dict[str, Any]
    offset: int
    body_offset: int
    body_bytes: int
    body_digest: bytes

    @property
    def end(self) -> int:
        return self.body_offset + self.body_bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes between whole frames, or behind the last one, that are no frame."""

    offset: int
    num_bytes: int
    is_tail: bool
    """Nothing whole follows: a write that did not end, as far as anyone can tell."""


def digest_of(*parts: bytes | memoryview) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.digest()[:DIGEST_BYTES]


def frame_start(head: dict[str, Any], body: bytes | memoryview) -> bytes:
    """What a frame has before its body."""
    text = json.dumps(head, separators=(",", ":")).encode()
    start = PREFIX.pack(MAGIC, len(text), memoryview(body).nbytes, digest_of(body)) + text
    return start + digest_of(start)


def read_frames(path: Path) -> Iterator[Frame | Damage]:
    """What a file holds, in order, from its heads; bodies are only known to be long enough.

    Damage is said once for each run of bytes that is no frame.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        offset = 0
        while offset < size:
            frame = _read_frame(file, offset, size)
            if frame is None:
                next_offset = _find_frame(file, offset + 1, size)
                is_tail = next_offset is None
                end = size if next_offset is None else next_offset
                yield Damage(offset, end - offset, is_tail)
                offset = end
                continue
            yield frame
            offset = frame.end


def read_body(path: Path, frame: Frame, into: memoryview) -> bool:
    """Read the frame's body into memory of its size; whether it is what was written."""
    with path.open("rb", buffering=0) as file:
        file.seek(frame.body_offset)
        done = 0
        while done < frame.body_bytes and (count := file.readinto(into[done:])):
            done += count
    return digest_of(into) == frame.body_digest


def is_whole(path: Path, frame: Frame) -> bool:
    """Whether the frame's body is what was written."""
    return read_body(path, frame, memoryview(bytearray(frame.body_bytes)))


def _read_frame(file: BinaryIO, offset: int, size: int) -> Frame | None:
    file.seek(offset)
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    magic, head_bytes, body_bytes, body_digest = PREFIX.unpack(prefix)
    if magic != MAGIC or head_bytes > MAX_HEAD_BYTES:
        return None
    text, digest = file.read(head_bytes), file.read(DIGEST_BYTES)
    if digest_of(prefix, text) != digest:
        return None
    body_offset = offset + PREFIX.size + head_bytes + DIGEST_BYTES
    if body_offset + body_bytes > size:
        return None
    return Frame(json.loads(text), offset, body_offset, body_bytes, body_digest)


def _find_frame(file: BinaryIO, offset: int, size: int) -> int | None:
    """Where the next whole frame begins, if there is one."""
    while offset < size:
        file.seek(offset)
        # Blocks overlap by what a magic needs, so that none hides on a border.
        block = file.read(SEARCH_BYTES + len(MAGIC) - 1)
        at = block.find(MAGIC)
        while at >= 0:
            if _read_frame(file, offset + at, size) is not None:
                return offset + at
            at = block.find(MAGIC, at + 1)
        offset += SEARCH_BYTES
    return None
