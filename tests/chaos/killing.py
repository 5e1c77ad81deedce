"""Kills processes of a running service at random times."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import httpx
import psutil

from tests.servers import TestServer, gateway_of, workers_of

LONGEST_LIFE_SECONDS = 1.5
"""Unless told otherwise."""
READY_SECONDS = 60.0


class Killer:
    """`kill -9` of the worker, the gateway or both, each time a while after all are ready."""

    def __init__(
        self,
        server: TestServer,
        num_kills: int,
        seed: int,
        longest_life_seconds: float = LONGEST_LIFE_SECONDS,
    ) -> None:
        self._server, self._num_kills = server, num_kills
        self._longest_life_seconds = longest_life_seconds
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._kill_all, name="killer", daemon=True)
        self.killed = dict.fromkeys(("worker", "gateway", "both"), 0)
        self.failure: BaseException | None = None
        self.is_over = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def _kill_all(self) -> None:
        try:
            for _ in range(self._num_kills):
                self._wait_until_ready()
                time.sleep(self._random.uniform(0.0, self._longest_life_seconds))
                self._kill(self._random.choice(tuple(self.killed)))
            self._wait_until_ready()
        except BaseException as error:
            self.failure = error
        finally:
            self.is_over.set()

    def _kill(self, what: str) -> None:
        for victim in self._victims(what):
            victim.kill()
        self.killed[what] += 1

    def _victims(self, what: str) -> list[psutil.Process]:
        """The living processes of that kind; there is always one again soon."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error, ValueError):
                gateway, workers = gateway_of(self._server), workers_of(self._server)
                if workers:
                    alone = {"worker": workers, "gateway": [gateway]}
                    return alone.get(what, [gateway, *workers])
            time.sleep(0.02)
        raise AssertionError(f"nothing to kill within {READY_SECONDS:g} s")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self._server.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"not ready again within {READY_SECONDS:g} s")
