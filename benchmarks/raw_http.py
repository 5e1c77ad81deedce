"""The lightest client that can hold thousands of requests open: HTTP/1.1 by hand, on asyncio.

SDKs and HTTP libraries use more of the cores per request than the service does; what is measured
through this client is nearly the service alone. It speaks to our own service: a whole answer with a
Content-Length, or an error. `python -m benchmarks.raw_http` answers every request at once, so that
the client can be measured apart.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONNECTS_AT_ONCE = 64
CANNED = b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"request_id": "canned"}'


@dataclass(frozen=True)
class Reply:
    """One answer."""

    status: int
    headers: Mapping[bytes, bytes]
    """By lower-case name."""
    body: bytes

    @property
    def json(self) -> Any:
        """The body's content. Raises RuntimeError for an error answer."""
        if self.status != 200:
            raise RuntimeError(f"HTTP {self.status}: {self.body[:300]!r}")
        return json.loads(self.body)

    @property
    def timing_seconds(self) -> dict[str, float]:
        """What the Server-Timing header says; empty without one."""
        entries = self.headers.get(b"server-timing", b"").decode().split(", ")
        pairs = (entry.split(";dur=") for entry in entries if entry)
        return {name: float(milliseconds) / 1000 for name, milliseconds in pairs}


class Connection:
    """A kept-alive connection: one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def post(self, request: bytes) -> Reply:
        """The answer to a request made by `Site.request`. Raises EOFError when cut off."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        pairs = (line.split(b": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in pairs}
        body = await self._reader.readexactly(int(headers[b"content-length"]))
        return Reply(int(first.split(b" ", 2)[1]), headers, body)

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True)
class Site:
    """Where requests go, and with which key."""

    host: str
    port: int
    key: str

    @classmethod
    def of(cls, url: str, key: str) -> Site:
        host, _, port = url.removeprefix("http://").partition(":")
        return cls(host, int(port), key)

    def request(self, path: str, **body: Any) -> bytes:
        """A POST as bytes."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    async def connect(self) -> Connection:
        return Connection(*await asyncio.open_connection(self.host, self.port))


class Connections:
    """Many open connections; used as a context, which closes them."""

    def __init__(self, site: Site, count: int) -> None:
        self._site, self._count = site, count
        self._open: list[Connection] = []

    async def __aenter__(self) -> Sequence[Connection]:
        for start in range(0, self._count, CONNECTS_AT_ONCE):
            count = min(CONNECTS_AT_ONCE, self._count - start)
            self._open += await asyncio.gather(*(self._site.connect() for _ in range(count)))
        return self._open

    async def __aexit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()


@dataclass(frozen=True)
class TinkerSampler:
    """A sampling session over a bare base, without the SDK."""

    site: Site
    sampler_id: str

    @classmethod
    async def open(cls, site: Site, base: str) -> TinkerSampler:
        async with Connections(site, 1) as (connection,):
            session = await connection.post(
                site.request(
                    "/api/v1/create_session", tags=[], user_metadata={}, sdk_version="0.38.0"
                )
            )
            sampler = await connection.post(
                site.request(
                    "/api/v1/create_sampling_session",
                    session_id=session.json["session_id"],
                    sampling_session_seq_id=0,
                    base_model=base,
                )
            )
        return cls(site, sampler.json["sampling_session_id"])

    async def submit(
        self,
        connection: Connection,
        prompt: Sequence[int],
        prompt_logprobs: bool = False,
        **params: Any,
    ) -> str:
        """Opens a sample; the `request_id` of its future."""
        reply = await connection.post(
            self.site.request(
                "/api/v1/asample",
                sampling_session_id=self.sampler_id,
                num_samples=1,
                prompt={"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
                prompt_logprobs=prompt_logprobs,
                sampling_params={"stop": [], **params},
            )
        )
        return str(reply.json["request_id"])

    async def retrieve(self, connection: Connection, request_id: str) -> Reply:
        """Polls until the future has ended. Raises RuntimeError when it failed."""
        request = self.site.request("/api/v1/retrieve_future", request_id=request_id)
        while (reply := await connection.post(request)).status == 408:
            pass
        if "error" in reply.json:
            raise RuntimeError(f"{request_id} failed: {reply.json['error']}")
        return reply

    async def logprobs(self, connection: Connection, tokens: Sequence[int]) -> list[float | None]:
        """Log-probability of each token after those before it; None for the first."""
        request_id = await self.submit(connection, tokens, prompt_logprobs=True, max_tokens=1)
        found: list[float | None] = (await self.retrieve(connection, request_id)).json[
            "prompt_logprobs"
        ]
        return found


async def answer_at_once() -> None:
    """Serve canned answers on a free loopback port, which is printed, until killed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-L"))
            await reader.readexactly(int(length.partition(b": ")[2]))
            writer.write(CANNED)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


if __name__ == "__main__":
    asyncio.run(answer_at_once())
