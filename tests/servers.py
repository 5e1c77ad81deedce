"""A real `openmint serve` process for tests, and what a client needs to talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from openmint.models.embedded import EMBEDDED_BASE

READY_SECONDS = 120.0
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class TestServer:
    """A running service. `client_dir` is a working folder where tokenizers are found by name."""

    __test__ = False

    url: str
    data: Path
    log: Path
    process: subprocess.Popen[bytes]
    base: str = EMBEDDED_BASE

    @property
    def admin_key(self) -> str:
        return (self.data / "admin.key").read_text().strip()

    @property
    def client_dir(self) -> Path:
        return self.data / "client"

    def make_key(self, tenant: str, role: str = "train") -> str:
        """A new API key of a tenant, made by the command line as an operator would."""
        return run_cli(
            "keys", "create", "--data", str(self.data), "--tenant", tenant, "--role", role
        ).stdout.strip()

    def client_env(self, key: str) -> dict[str, str]:
        """The environment of a client process: addresses, key, no hub."""
        return {
            **os.environ,
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": key,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": key,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }

    def worker_stats(self) -> list[dict[str, Any]]:
        """What each worker says of itself, as of about a second ago."""
        headers = {"X-API-Key": self.admin_key}
        answer = httpx.get(f"{self.url}/catalog/v1/stats", headers=headers).raise_for_status()
        found: list[dict[str, Any]] = answer.json()["bases"]
        return found

    def errors_in_log(self) -> list[str]:
        """Log lines at level error or above."""
        levels = ('"level": "error"', '"level": "critical"')
        return [
            line for line in self.log.read_text().splitlines() if any(x in line for x in levels)
        ]


def gateway_of(server: TestServer) -> psutil.Process:
    """The gateway process that the service has now. Raises ValueError between two of them."""
    (gateway,) = psutil.Process(server.process.pid).children()
    return gateway


def workers_of(server: TestServer) -> list[psutil.Process]:
    """The worker processes that the service has now."""
    return _running(server, "openmint.cluster.worker")


def other_ranks_of(server: TestServer) -> list[psutil.Process]:
    """The further processes of its workers, where a base is divided."""
    return _running(server, "openmint.cluster.other_rank")


def _running(server: TestServer, module: str) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if _runs(child, module)]


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


@contextmanager
def running_server(
    root: Path,
    *,
    bases: Sequence[str] = (EMBEDDED_BASE,),
    bases_from: Path | None = None,
    options: Sequence[str] = (),
    environ: dict[str, str] | None = None,
) -> Iterator[TestServer]:
    """Serve from the data folder under `root`, which is made unless it is there.

    `bases_from` is a data folder whose converted bases are shared. At the end the process gets
    SIGTERM and must exit 0 without an error in its log.
    """
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    if bases_from is not None:
        (data / "bases").symlink_to((bases_from / "bases").resolve())
    server = start_server(root, data, bases=bases, options=options, environ=environ or {})
    try:
        wait_until_ready(server)
        yield server
    except BaseException:
        server.process.kill()
        server.process.wait()
        raise
    stop_server(server)
    assert not server.errors_in_log(), "\n".join(server.errors_in_log()[:5])


@contextmanager
def mortal_server(
    root: Path, *, bases: Sequence[str], environ: dict[str, str] | None = None
) -> Iterator[TestServer]:
    """`running_server` whose processes a test kills, as deaths are errors in its log: nobody looks
    there. It must be alive at the end."""
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    server = start_server(root, data, bases=bases, environ=environ)
    try:
        wait_until_ready(server)
        yield server
    finally:
        stop_server(server)


def start_server(
    root: Path,
    data: Path,
    *,
    bases: Sequence[str] = (EMBEDDED_BASE,),
    options: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    port: int | None = None,
) -> TestServer:
    """A server process, on a free loopback port unless told; not ready yet."""
    port = port or free_port()
    log = root / "server.log"
    command = [sys.executable, "-m", "openmint", "serve", "--port", str(port), "--data", str(data)]
    for base in bases:
        command += ["--base", base]
    env = {**os.environ, "OPENMINT_LOG_FORMAT": "json", "PYTHONUNBUFFERED": "1", **(environ or {})}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*command, *options], stdout=stream, stderr=subprocess.STDOUT, env=env
        )
    return TestServer(f"http://127.0.0.1:{port}", data, log, process)


def wait_until_ready(server: TestServer) -> None:
    """Returns once /readyz is 200. Raises AssertionError with the end of the log otherwise."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    server.process.kill()
    raise AssertionError(f"the server didn't get ready:\n{server.log.read_text()[-4000:]}")


def stop_server(server: TestServer) -> None:
    """SIGTERM, then exit 0 within the limit."""
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise
    assert code == 0, f"exit code {code} after SIGTERM:\n{server.log.read_text()[-4000:]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_cli(
    *arguments: str, code: int = 0, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`openmint` with these arguments in a process of its own; fails on any other exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "openmint", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(environ or {})},
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_cli_json(*arguments: str, environ: dict[str, str] | None = None) -> object:
    """The parsed `--json` output of a command."""
    return json.loads(run_cli(*arguments, "--json", environ=environ).stdout)
