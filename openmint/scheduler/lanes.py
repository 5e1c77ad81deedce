"""One lane per training run: its commands take effect in the order in which they came.

Train works at the head of a lane may run together, as gradients add up in any order; everything
else waits until all before it is done. Lanes stand in a queue, and one that has made its update
goes to the end: updates follow each other instead of all ending last, and no run holds up another
by always having something queued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from openmint.engine.plan import MicroBatch, TrainItem
from openmint.scheduler.fairness import TenantClock
from openmint.scheduler.work import OptimWork, RunCommand, TrainWork
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

    @property
    def ends_turn(self) -> bool:
        """Whether its lane lets the others go first once it is done: the update is made, or it was
        a pass that belongs to none."""
        command = self.command
        return isinstance(command, OptimWork) or (
            isinstance(command, TrainWork) and command.forward_only
        )

    @property
    def todo_tokens(self) -> int:
        return sum(map(self.tokens_of, self.todo))

    def may_share(self, budget_tokens: int) -> bool:
        """Whether others may be in its micro-batch: not when it fills more than one by itself."""
        return not self.is_alone and not self.is_open and self.todo_tokens <= budget_tokens

    def take(self, budget_tokens: int) -> tuple[list[TrainItem], int]:
        """Its next data and their tokens: an even part of what is left to do, so that the last
        micro-batch isn't a small one. Never empty: a datum over the budget goes by itself."""
        left_tokens = self.todo_tokens
        even_tokens = left_tokens / -(-left_tokens // budget_tokens)
        items, num_tokens = list[TrainItem](), 0
        while self.todo and num_tokens < even_tokens:
            size = self.tokens_of(self.todo[0])
            if items and num_tokens + size > budget_tokens:
                break
            items.append(TrainItem(self.work_id, self.todo.popleft()))
            num_tokens += size
        return items, num_tokens


class Lanes:
    """The queues of all runs."""

    def __init__(self) -> None:
        self._lanes: dict[RunId, deque[Entry]] = {}

    def add(self, entry: Entry) -> None:
        self._lanes.setdefault(entry.command.run_id, deque()).append(entry)

    def remove(self, entry: Entry) -> None:
        """Forget a command that is done."""
        run_id = entry.command.run_id
        lane = self._lanes[run_id]
        lane.remove(entry)
        if entry.ends_turn:
            self._lanes[run_id] = self._lanes.pop(run_id)
        if not lane:
            del self._lanes[run_id]

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

        A begun work goes to its end first, then the tenant furthest behind, then the lanes in their
        order. A work of more than one micro-batch has no company: its sums are added in the same
        order whoever else trains, so its gradient is to the bit what it would be alone. Smaller
        ones share a micro-batch, each of them whole. Planned data leave their entries.
        """
        entries = sorted(fairness.in_order(self.trainable()), key=lambda entry: not entry.is_open)
        first, *others = entries
        company = others if first.may_share(budget_tokens) else []
        items, num_tokens = first.take(budget_tokens)
        used = [first]
        for entry in company:
            room = budget_tokens - num_tokens
            if not entry.may_share(budget_tokens) or entry.todo_tokens > room:
                break
            more, size = entry.take(room)
            items, num_tokens = items + more, num_tokens + size
            used.append(entry)
        for entry in used:
            entry.had_company |= len(used) > 1
        return MicroBatch(tuple(items), num_tokens), used
