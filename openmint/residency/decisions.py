"""The log of what a worker's host memory was asked for and did, so that it can be done over.

Lines of JSON in `data/residency/<base>.jsonl`; when the file is long it becomes `<base>.1.jsonl`,
in the place of the one before. Replaying the lines gives the same evictions (`redo`), and tells
what another order or size of memory would have loaded (`openmint residency`). A worker learns from
it at its start what is asked for (`recall`). It is for looking and guessing, not for recovery: it
isn't synced, and its last second may be missing after a crash.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Literal, cast

from openmint.errors import InvalidRequest
from openmint.residency.eviction import LeastWorth
from openmint.residency.load_times import LoadTimes
from openmint.residency.replay import Use
from openmint.residency.tier import Tier
from openmint.types import Digest

MOST_BYTES = 32 << 20
"""Of one file; about 300,000 lines."""
MOST_RECALLED = 16_384
"""Uses of before that a worker learns from at its start."""
RECALLED_BYTES = MOST_RECALLED * 256
"""Of the log's end, in which so many uses are likely to be found."""

NOBODY = Digest("")
Kind = Literal["start", "recall", "want", "hold", "release", "refuse", "load", "admit", "evict"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happened to a revision: it was wanted (and held), held for an alias's pin, let go of,
    refused, loaded in so many seconds, taken into host memory, or sent out of it. `start` begins a
    worker's memory anew; a `recall` after it says, in place of the bytes, how many of the uses
    before it were learned."""

    kind: Kind
    revision: Digest = NOBODY
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Recalled:
    """What was asked for before, as far as the log's end tells it."""

    uses: Sequence[Digest] = ()
    """The oldest first."""
    sizes: Mapping[Digest, int] = field(default_factory=dict)
    """Bytes of those that were in memory at some time."""


class DecisionLog:
    """Appends decisions to a file of bounded length. For one thread."""

    def __init__(self, path: Path, budget_bytes: int, most_bytes: int = MOST_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._path, self._most_bytes = path, most_bytes
        self._file = path.open("a")
        self.note(Decision("start", num_bytes=budget_bytes))

    def note(self, decision: Decision) -> None:
        entry = [decision.kind, decision.revision, decision.num_bytes, decision.seconds]
        self._file.write(json.dumps(entry) + "\n")

    def flush(self) -> None:
        """Give the lines to the system; start a new file when this one is long enough."""
        self._file.flush()
        if self._file.tell() > self._most_bytes:
            self._file.close()
            self._path.replace(older(self._path))
            self._file = self._path.open("a")


class NoDecisions:
    """Stands where nobody wants to know."""

    def note(self, decision: Decision) -> None:
        pass

    def flush(self) -> None:
        pass


def older(path: Path) -> Path:
    return path.with_suffix(".1.jsonl")


def is_newest(path: Path) -> bool:
    """Whether lines are appended to it, as against one that was set aside."""
    return path.suffixes == [".jsonl"]


def path_of(data: Path, base: Digest, replica: int = 0) -> Path:
    """The log of one worker of a base."""
    which = f"-{replica}" if replica else ""
    return data / "residency" / f"{base.removeprefix('sha256:')}{which}.jsonl"


def read_decisions(path: Path) -> Iterator[Decision]:
    """All that is kept, the oldest first; a line that a crash cut off is left out at the end.

    Raises InvalidRequest for anything else that is no such line.
    """
    for file in (older(path), path):
        if not file.is_file():
            continue
        lines = file.read_text().split("\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                yield _parse(line)
            except ValueError:
                raise InvalidRequest(
                    f"{file}, line {number}, is no decision: {line[:80]!r}"
                ) from None


def recall(path: Path) -> Recalled:
    """The last uses that the log tells of; call it before a worker begins to append.

    Only its end is read. A line that is damaged hides all before it.
    """
    uses, sizes = deque[Digest](maxlen=MOST_RECALLED), dict[Digest, int]()
    for line in _end_of(path).split(b"\n")[:-1]:
        try:
            decision = _parse(line)
        except ValueError:  # or it is the end of a line whose beginning wasn't read
            uses.clear()
            sizes.clear()
            continue
        if decision.kind in ("want", "refuse"):
            uses.append(decision.revision)
        if _tells_size(decision):
            sizes[decision.revision] = decision.num_bytes
    return Recalled(tuple(uses), {each: sizes[each] for each in uses if each in sizes})


def _end_of(path: Path) -> bytes:
    end = b""
    for file in (path, older(path)):
        if file.is_file():
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - (RECALLED_BYTES - len(end))))
                end = opened.read() + end
    return end


def _drop_torn_line(path: Path) -> None:
    """What a crash left of a line would spoil the one that is written next."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        # Mapped, so that of a long log only its end is read.
        with mmap(file.fileno(), 0, access=ACCESS_READ) as written:
            whole_bytes = written.rfind(b"\n") + 1
        file.truncate(whole_bytes)


def _parse(line: str | bytes) -> Decision:
    """Raises ValueError for what is no decision."""
    match json.loads(line):
        case [str(kind), str(revision), int(num_bytes), int() | float() as seconds]:
            return Decision(cast(Kind, kind), Digest(revision), num_bytes, seconds)
    raise ValueError("no decision")


def _tells_size(decision: Decision) -> bool:
    return decision.kind == "admit" or (decision.kind == "want" and decision.num_bytes > 0)


def uses_of(decisions: Iterable[Decision]) -> list[Use]:
    """What was wanted, with its size, in order; what never was in memory is left out."""
    found = list(decisions)
    sizes = {each.revision: each.num_bytes for each in found if _tells_size(each)}
    wanted = [each.revision for each in found if each.kind == "want"]
    return [Use(revision, sizes[revision]) for revision in wanted if revision in sizes]


def times_of(decisions: Iterable[Decision]) -> LoadTimes:
    """What loads took."""
    times = LoadTimes()
    for each in decisions:
        if each.kind == "load":
            times.learn(each.num_bytes, each.seconds)
    return times


def redo(decisions: Iterable[Decision]) -> Iterator[tuple[list[Digest], list[Digest]]]:
    """For each revision taken in, who was sent out for it, and whom the same order sends out now.

    Begins with the first start that is kept, with all that was learned then.
    """
    tier: Tier | None = None
    times, sent_out = LoadTimes(), list[Digest]()
    before = deque[Digest](maxlen=MOST_RECALLED)
    for each in decisions:
        if each.kind == "start":
            times, sent_out = LoadTimes(), []
            tier = Tier(each.num_bytes, LeastWorth(times))
        elif each.kind == "recall" and len(before) < each.num_bytes:
            tier = None  # what was learned is not kept
        if each.kind in ("want", "refuse"):
            before.append(each.revision)
        if tier is None:
            continue
        match each.kind:
            case "recall":
                for revision in list(before)[-each.num_bytes :]:
                    tier.use(revision)
            case "want":
                tier.use(each.revision)
                tier.pin(each.revision)
            case "hold":
                tier.pin(each.revision)
            case "refuse":
                tier.use(each.revision)
            case "release":
                tier.unpin(each.revision)
            case "load":
                times.learn(each.num_bytes, each.seconds)
            case "evict":
                sent_out.append(each.revision)
            case "admit":
                yield sent_out, tier.room_for(each.num_bytes) or []
                for revision in sent_out:
                    tier.evict(revision)
                tier.admit(each.revision, each.num_bytes)
                sent_out = []
