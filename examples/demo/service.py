"""The service of the demo: started as an operator starts it, watched, and stopped in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

READY_SECONDS = 180.0
"""The first start converts the embedded base, which takes about half a minute."""
STOP_SECONDS = 60.0
WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class Service:
    """A running `openmint serve`."""

    url: str
    data: Path
    process: subprocess.Popen[bytes]

    def create_key(self, tenant: str) -> str:
        """A new API key of a tenant, made on the command line."""
        return self.cli("keys", "create", "--data", str(self.data), "--tenant", tenant)

    def cli(self, *arguments: str, key: str = "") -> str:
        """What an `openmint` command prints. Raises CalledProcessError when it fails."""
        environ = {**os.environ, "OPENMINT_URL": self.url, "OPENMINT_API_KEY": key}
        command = [sys.executable, "-m", "openmint", *arguments]
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip()

    def stored_bytes(self) -> int:
        """Bytes of all adapters and states in the store."""
        files = [*(self.data / "blobs").rglob("*"), *(self.data / "packs").iterdir()]
        return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def running_service(data: Path, log: Path) -> Iterator[Service]:
    """`openmint serve` on a free port until the block ends; then SIGTERM, which must exit 0."""
    port = _free_port()
    command = [sys.executable, "-m", "openmint", "serve", "--port", str(port), "--data", str(data)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    service = Service(f"http://127.0.0.1:{port}", data, process)
    try:
        _wait_until_ready(service, log)
        yield service
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.send_signal(signal.SIGTERM)
    code = process.wait(STOP_SECONDS)
    if code != 0:
        raise RuntimeError(f"the service exited with {code} after SIGTERM; see {log}")


class MemoryWatch:
    """The most resident memory that this process and its children held together."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(WATCH_SECONDS):
            self.peak_bytes = max(self.peak_bytes, _resident_bytes(me))


def _resident_bytes(root: psutil.Process) -> int:
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # a command that ended while we looked
    return total


def _wait_until_ready(service: Service, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and service.process.poll() is None:
        try:
            if httpx.get(f"{service.url}/readyz", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise RuntimeError(
        f"the service didn't get ready; its log is {log}:\n{log.read_text()[-2000:]}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
