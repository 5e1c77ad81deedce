"""Frames between gateway and worker: `<u64 length><pickle>`.

They travel on a socket pair that only these two processes hold, one the parent of the other, so no
foreign byte is ever unpickled.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any

HEADER = struct.Struct("<Q")


def frame(message: Any) -> bytes:
    """The bytes of one message."""
    body = pickle.dumps(message, protocol=5)
    return HEADER.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises IncompleteReadError when the other side has gone."""
    (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    return pickle.loads(await reader.readexactly(length))
