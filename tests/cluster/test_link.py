"""Frames: what goes in comes out, and a broken stream is told from a message."""

from __future__ import annotations

import asyncio
import socket

import pytest

from openmint.cluster.link import frame, read_frame
from openmint.cluster.worker import Link
from openmint.errors import NonFinite, Overloaded
from openmint.scheduler.work import Done, Failed


def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=64)
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def test_messages_of_any_size_arrive_in_order() -> None:
    messages = [Done(1, None), b"x" * 300_000, Done(2, None)]

    async def read() -> list[object]:
        reader = reader_of(b"".join(map(frame, messages)))
        return [await read_frame(reader) for _ in messages]

    assert asyncio.run(read()) == messages


def test_a_cut_message_is_no_message() -> None:
    async def read(data: bytes) -> None:
        with pytest.raises(asyncio.IncompleteReadError):
            await read_frame(reader_of(data))

    whole = frame(Done(1, None))
    for stop in (0, 5, 8, len(whole) - 1):
        asyncio.run(read(whole[:stop]))


def test_the_workers_end_speaks_the_same_frames() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Link(theirs)
        ours.sendall(frame("hello") + frame("cut")[:-1])
        assert link.receive() == "hello"
        ours.shutdown(socket.SHUT_WR)
        assert link.receive() is None
        link.send(Failed(3, Overloaded("full", 7.0)))
        length = int.from_bytes(ours.recv(8), "little")
        assert len(ours.recv(length)) == length
        link._stream.close()


def test_errors_survive_the_link_whole() -> None:
    async def read() -> list[Failed]:
        errors = [Overloaded("full", 7.0), NonFinite("NaN in it")]
        reader = reader_of(b"".join(frame(Failed(i, e)) for i, e in enumerate(errors)))
        return [await read_frame(reader) for _ in errors]

    full, nan = asyncio.run(read())
    assert isinstance(full.error, Overloaded)
    assert (str(full.error), full.error.retry_after_seconds) == ("full", 7.0)
    assert type(nan.error) is NonFinite
