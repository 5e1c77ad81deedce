"""One lane per training run: its commands take effect in the order in which they came.

Train works at the head of a lane may run together, as gradients add up in any order; everything
else waits until all before it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from openmint.engine.plan import MicroBatch, TrainItem
from openmint.scheduler.fairness import TenantClock
from openmint.scheduler.work import RunCommand, TrainWork
from openmint.types import RunId, Tenant


@dataclass(eq=False)
class Entry:
    """A queued command; `is_open` once begun. A train work also says which data are to run."""

    work_id: int
    command: RunCommand
    todo: deque[int] = field(default_factory=deque)
    num_unfinished: int = 0
    is_open: bool = False
    had_company: bool = False
    """Some micro-batch of this work held another's data too."""
    is_alone: bool = False
    """Share no micro-batch: see `start_over_alone`."""

    def __post_init__(self) -> None:
        if isinstance(self.command, TrainWork):
            lengths = [len(datum.tokens_N) for datum in self.command.data]
            # Data of like length stand together, so that micro-batches need little padding.
            self.todo.extend(sorted(range(len(lengths)), key=lambda i: -lengths[i]))
            self.num_unfinished = len(lengths)

    def start_over_alone(self) -> None:
        """Run the whole work again without company.

        In a shared batch another's overflow turns the zeros between adapters into NaN (0 x inf), so
        a gradient that isn't finite is judged only after the work ran by itself.
        """
        self.is_open, self.had_company, self.is_alone = False, False, True
        self.__post_init__()

    @property
    def tenant(self) -> Tenant:
        return self.command.tenant

    def tokens_of(self, datum_index: int) -> int:
        assert isinstance(self.command, TrainWork)
        return len(self.command.data[datum_index].tokens_N)


class Lanes:
    """The queues of all runs."""

    def __init__(self) -> None:
        self._lanes: dict[RunId, deque[Entry]] = {}

    def add(self, entry: Entry) -> None:
        self._lanes.setdefault(entry.command.run_id, deque()).append(entry)

    def remove(self, entry: Entry) -> None:
        lane = self._lanes[entry.command.run_id]
        lane.remove(entry)
        if not lane:
            del self._lanes[entry.command.run_id]

    def __iter__(self) -> Iterator[Entry]:
        return (entry for lane in self._lanes.values() for entry in lane)

    def next_control(self) -> Entry | None:
        """A command other than training that stands at the head of its lane, not yet begun."""
        heads = (lane[0] for lane in self._lanes.values())
        ready = (head for head in heads if not isinstance(head.command, TrainWork))
        return next((head for head in ready if not head.is_open), None)

    def trainable(self) -> list[Entry]:
        """Train works that may run now and have data left to plan, lane by lane."""
        ready = []
        for lane in self._lanes.values():
            for entry in lane:
                if not isinstance(entry.command, TrainWork):
                    break
                if entry.todo:
                    ready.append(entry)
        return ready

    def plan(self, budget_tokens: int, fairness: TenantClock) -> tuple[MicroBatch, list[Entry]]:
        """The next micro-batch, and the works in it. Only called when something is trainable.

        A begun work goes first and to its end, so that policies finish one after another rather
        than all at last; then the tenant furthest behind. What is left of the budget is filled from
        the next works. Planned data leave their entries.
        """
        entries = sorted(fairness.in_order(self.trainable()), key=lambda entry: not entry.is_open)
        items: list[TrainItem] = []
        used: list[Entry] = []
        num_tokens = 0
        for entry in entries:
            if used and (entry.is_alone or used[0].is_alone):
                continue
            while entry.todo:
                size = entry.tokens_of(entry.todo[0])
                if items and num_tokens + size > budget_tokens:
                    break
                items.append(TrainItem(entry.work_id, entry.todo.popleft()))
                num_tokens += size
                if entry not in used:
                    used.append(entry)
            if num_tokens >= budget_tokens or entry.todo:
                break
        for entry in used:
            entry.had_company |= len(used) > 1
        return MicroBatch(tuple(items), num_tokens), used
