"""Cold loads as scheduled work: which revision is read next, and whether it can be there in time.

A book only: who asks it reads the bytes. Loads of one revision are one load. Their queue is
bounded; what can't be there by its deadline, by the loads measured so far, is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from openmint.errors import Overloaded
from openmint.residency.load_times import LoadTimes
from openmint.types import Digest, Priority


@dataclass(slots=True)
class Load:
    """A load that waits for its turn."""

    priority: Priority
    deadline_at: float
    number: int

    @property
    def turn(self) -> tuple[Priority, float, int]:
        return self.priority, self.deadline_at, self.number


class LoadQueue:
    """Loads that wait and loads that run. Times are seconds on the caller's clock."""

    def __init__(self, num_parallel: int, most_waiting: int, times: LoadTimes) -> None:
        self._times = times
        self._num_parallel, self._most_waiting = num_parallel, most_waiting
        self._waiting: dict[Digest, Load] = {}
        self._running: set[Digest] = set()
        self._prefetch: Digest | None = None
        self._number = 0

    def __contains__(self, revision: Digest) -> bool:
        return revision in self._waiting or self._runs(revision)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running) + (self._prefetch is not None)

    @property
    def is_idle(self) -> bool:
        """No load waits or runs."""
        return not self._waiting and not self.num_running

    def want(self, revision: Digest, priority: Priority, now: float, deadline_at: float) -> None:
        """Have it loaded, once, in the order of priorities, then of deadlines.

        Raises Overloaded, with the time after which to ask again, when the queue is full or the
        load is not likely to end before the deadline.
        """
        if self._runs(revision):
            return
        load = Load(priority, deadline_at, self._number)
        if (known := self._waiting.get(revision)) is not None:
            load.priority = min(priority, known.priority)
            load.deadline_at = min(deadline_at, known.deadline_at)
            load.number = known.number
        seconds = self.estimate_seconds(load)
        if known is None and len(self._waiting) >= self._most_waiting:
            raise Overloaded(
                f"{len(self._waiting)} adapters wait to be loaded, which is the limit "
                f"(worker.waiting_loads); ask again in {seconds:.1f} s",
                seconds,
            )
        if (late := now + seconds - deadline_at) > 0:
            raise Overloaded(
                f"revision {revision} is not in memory; loading it is likely to take "
                f"{seconds:.1f} s with those before it, {late:.1f} s more than the deadline allows",
                max(1.0, late),
            )
        self._waiting[revision] = load
        self._number += 1

    def estimate_seconds(self, load: Load) -> float:
        """Seconds until such a load is likely to be over, if it were queued now."""
        before = sum(other.turn < load.turn for other in self._waiting.values())
        rounds = (before + len(self._running)) / self._num_parallel
        return (rounds + 1) * self._times.mean_seconds

    def start(self) -> Digest | None:
        """The next load to run, None when none waits or enough run."""
        if not self._waiting or len(self._running) >= self._num_parallel:
            return None
        revision = min(self._waiting, key=lambda each: self._waiting[each].turn)
        del self._waiting[revision]
        self._running.add(revision)
        return revision

    def start_prefetch(self, revision: Digest) -> None:
        """One load that nobody asked for, while the queue is idle. It takes no place of those that
        somebody waits for, and makes no estimate longer."""
        assert self.is_idle
        self._prefetch = revision

    def end(self, revision: Digest) -> None:
        """A load is over."""
        if revision == self._prefetch:
            self._prefetch = None
        else:
            self._running.remove(revision)

    def give_up(self, revision: Digest) -> None:
        """Nobody wants it any more. A load that runs goes on."""
        self._waiting.pop(revision, None)

    def _runs(self, revision: Digest) -> bool:
        return revision in self._running or revision == self._prefetch
