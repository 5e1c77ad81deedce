"""What do this process and a service's processes use of the machine, all together?"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

from benchmarks.machine import busy_seconds

SAMPLE_SECONDS = 0.25
PAUSE_SECONDS = 2.0
"""So long nobody reads the time only when this process was stopped, and its service with it."""


class Family:
    """This process, the service's and their children."""

    def __init__(self, service_pid: int) -> None:
        self._own = psutil.Process()
        service = psutil.Process(service_pid)
        self._service = [service, *service.children(recursive=True)]
        self._own_command = self._own.cmdline()

    def resident_bytes(self) -> int:
        """Resident memory of all of them, graders included."""
        return sum(map(_resident_bytes, [self._own, *self._service, *self._graders()]))

    def cpu_seconds(self) -> float:
        """CPU time of all of them so far, of ended graders too."""
        times = [process.cpu_times() for process in [self._own, *self._service]]
        ended = times[0].children_user + times[0].children_system
        return float(sum(each.user + each.system for each in times) + ended)

    def _graders(self) -> list[psutil.Process]:
        """Children of this process other than the service.

        A child that was forked but runs no program yet still shows this one's memory and command.
        """
        known = {process.pid for process in self._service}
        others = [child for child in self._own.children() if child.pid not in known]
        return [child for child in others if _command(child) not in ([], self._own_command)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0  # it has ended


class RunClock:
    """Seconds since its start in which this process ran: not those in which someone stopped it, as
    a machine does that goes to sleep. It must be read often; a `MemoryWatch` does."""

    def __init__(self) -> None:
        self.paused_seconds = 0.0
        self.paused_busy_seconds = 0.0
        """CPU time of others meanwhile."""
        self._lock = threading.Lock()
        self._started_at = self._read_at = time.monotonic()
        self._busy = busy_seconds()

    def now(self) -> float:
        with self._lock:
            at, busy = time.monotonic(), busy_seconds()
            if at - self._read_at > PAUSE_SECONDS:
                self.paused_seconds += at - self._read_at
                self.paused_busy_seconds += busy - self._busy
            self._read_at, self._busy = at, busy
            return at - self._started_at - self.paused_seconds


class MemoryWatch:
    """Samples the family's memory until the block ends; `samples` are (seconds, bytes)."""

    def __init__(self, family: Family, clock: RunClock) -> None:
        self.samples: list[tuple[float, int]] = []
        self._family, self._clock, self._done = family, clock, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.samples.append((self._clock.now(), self._family.resident_bytes()))

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
