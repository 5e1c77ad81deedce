"""Which arm is faster, and by how much? The frame that all benchmarks share.

Arms take turns within one run (A, B, C, A, B, C, ...) after one warm-up each, so that whatever else
the machine does falls on all of them alike. A ratio is formed repeat by repeat, then its median is
taken. Nothing here imports torch: arms compute in processes of their own (`processes.py`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from benchmarks.machine import busy_seconds, num_cores

WARM_UP = -1
"""The lap of an arm's first, uncounted turn."""
LAPS_OF_A_TRY = 1000
"""A turn that is taken again has another lap, and with it other prompts: lap + this."""


@dataclass(frozen=True)
class Patience:
    """How a turn is kept clear of what other processes do on the machine."""

    settle_seconds: float = 0.5
    """Pause before each turn, in which the last arm's threads stop spinning."""
    calm_share: float = 0.1
    """A turn in which others used more of the cores is taken again."""
    wait_seconds: float = 120.0
    """How long a turn waits at most for others to finish."""
    num_tries: int = 5
    """The last try counts, calm or not; the result shows which it was."""

    @classmethod
    def waiting(cls, seconds: float) -> Patience:
        """Waits so long for each turn; with 0 every turn counts as it comes."""
        return cls(wait_seconds=seconds) if seconds else cls(wait_seconds=0.0, num_tries=1)


PATIENT = Patience()


class Unavailable(Exception):
    """This arm can't run here; the message says why, and the result says it too."""


class ArmFailed(Exception):
    """This arm broke. The others go on; the result says so, and the run ends with an error."""


@dataclass(frozen=True)
class Reading:
    """One turn of one arm: `tokens` in `seconds`, and what else the arm noticed."""

    seconds: float
    tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    lap: int = 0
    """Turns of the same lap had the same input, whatever the arm."""
    foreign_cpu: float = 0.0
    """Share of the cores that anything but this arm used meanwhile."""
    num_tries: int = 1

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Arm(Protocol):
    """One of the things that are compared."""

    @property
    def name(self) -> str: ...
    def prepare(self) -> None:
        """Get ready to run. Raises Unavailable or ArmFailed."""
        ...

    def run(self, lap: int) -> Reading:
        """Do the work once, on the input of this lap. Raises ArmFailed."""
        ...


@dataclass(frozen=True)
class Target:
    """`arm` must reach `at_least` times the rate of the fastest of `rivals`.

    The fastest is the one with the highest median. Without `at_least` the ratio is information.
    """

    work: str
    arm: str
    rivals: tuple[str, ...]
    at_least: float | None = None


Readings = Mapping[str, Sequence[Reading]]


@dataclass(frozen=True)
class Race:
    """Arms that take turns, and the ratios that are wanted of them."""

    title: str
    arms: Sequence[Arm]
    targets: Sequence[Target] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further columns of the table: heading -> key of `Reading.facts`, a number."""
    check: Callable[[Readings], list[str]] = lambda readings: []
    """Sentences on whether the arms really did the same work."""


@dataclass(frozen=True)
class Spread:
    """Median and range of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def show(self, unit: str = "") -> str:
        return f"{number(self.median)}{unit} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three digits that count: 1234, 123, 12.3, 1.23, 0.123."""
    if value == 0:
        return "0"
    digits = 0
    while abs(value) * 10**digits < 99.95 and digits < 4:
        digits += 1
    return f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Line:
    """One line of the table that `make bench` prints."""

    work: str
    target: str
    figure: str
    verdict: str


@dataclass(frozen=True)
class RaceResult:
    race: Race
    readings: dict[str, list[Reading]]
    """Per arm that ran to the end, one reading per repeat."""
    absent: dict[str, str]
    """Why the other arms have no readings."""
    failed: frozenset[str] = frozenset()
    """Those of `absent` that broke, as against those that can't run here."""


def run_race(race: Race, repeats: int, patience: Patience = PATIENT) -> RaceResult:
    """Every arm once to warm up, then `repeats` rounds of all arms in turn."""
    readings: dict[str, list[Reading]] = {arm.name: [] for arm in race.arms}
    absent: dict[str, str] = {}
    failed: set[str] = set()

    def attempt(arm: Arm, work: Callable[[], None]) -> None:
        try:
            if arm.name not in absent:
                work()
        except (Unavailable, ArmFailed) as error:
            absent[arm.name] = str(error)
            failed.update([arm.name] if isinstance(error, ArmFailed) else [])

    def turn(arm: Arm, lap: int) -> None:
        if lap == WARM_UP:
            arm.run(lap)
        else:
            readings[arm.name].append(calm_turn(arm, lap, patience))

    for arm in race.arms:
        attempt(arm, arm.prepare)
    for lap in [WARM_UP, *range(repeats)]:
        for arm in race.arms:
            attempt(arm, lambda arm=arm, lap=lap: turn(arm, lap))  # type: ignore[misc]
    whole = {name: of for name, of in readings.items() if name not in absent}
    return RaceResult(race, whole, absent, frozenset(failed))


def calm_turn(arm: Arm, lap: int, patience: Patience) -> Reading:
    """The arm's reading of a turn in which others let the machine be, if it can be had.

    What is taken again depends on others' use of the cores alone, never on the reading.
    """
    for num_tries in range(1, patience.num_tries + 1):
        time.sleep(patience.settle_seconds)
        wait_for_calm(patience)
        own_lap = lap + LAPS_OF_A_TRY * (num_tries - 1)
        reading, share = watched_turn(arm, own_lap)
        if share <= patience.calm_share:
            break
    return replace(reading, lap=own_lap, foreign_cpu=share, num_tries=num_tries)


def watched_turn(arm: Arm, lap: int) -> tuple[Reading, float]:
    """The arm's reading, and the share of the cores that others used in its time."""
    started_at, busy_before = time.monotonic(), busy_seconds()
    reading = arm.run(lap)
    wall_seconds = max(1e-9, time.monotonic() - started_at)
    foreign_seconds = busy_seconds() - busy_before - reading.facts.get("cpu_seconds", 0.0)
    return reading, max(0.0, foreign_seconds) / (wall_seconds * num_cores())


def wait_for_calm(patience: Patience, sample_seconds: float = 1.0) -> None:
    """Return when the machine idles, or when patience is at its end."""
    deadline = time.monotonic() + patience.wait_seconds
    while time.monotonic() < deadline:
        busy_before = busy_seconds()
        time.sleep(sample_seconds)
        if busy_seconds() - busy_before <= patience.calm_share * sample_seconds * num_cores():
            return


def ratios(arm: Sequence[Reading], rival: Sequence[Reading]) -> list[float]:
    """Rate of the arm over the rival's, repeat by repeat."""
    return [own.rate / other.rate for own, other in zip(arm, rival, strict=True)]


def fastest(names: Sequence[str], readings: Readings) -> str | None:
    """The name with the highest median rate among those that ran."""
    ran = [name for name in names if name in readings]
    rates = {name: statistics.median(reading.rate for reading in readings[name]) for name in ran}
    return max(ran, key=rates.__getitem__, default=None)


def line_of(target: Target, result: RaceResult) -> Line:
    """The target's figure and verdict; a missing arm is named with its reason."""
    wanted = "" if target.at_least is None else f"≥ {target.at_least:g}x"
    rival = fastest(target.rivals, result.readings)
    needed = [target.arm] if rival is not None else [target.arm, *target.rivals]
    reasons = [f"{name}: {result.absent[name]}" for name in needed if name in result.absent]
    if rival is None or reasons:
        return Line(target.work, wanted, "-", f"not measured ({'; '.join(reasons)})")
    spread = Spread.of(ratios(result.readings[target.arm], result.readings[rival]))
    figure = spread.show("x")
    if len(target.rivals) > 1:
        figure += f" against {rival}"
    return Line(target.work, wanted, figure, verdict(spread.median, target.at_least))


def verdict(value: float, at_least: float | None = None, at_most: float | None = None) -> str:
    """`met` or `missed`; `for information` when nothing was asked for."""
    if at_least is None and at_most is None:
        return "for information"
    enough = at_least is None or value >= at_least
    little = at_most is None or value <= at_most
    return "met" if enough and little else "missed"


# -- reports --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a question's run found out: text for people, `data` for programs."""

    question: str
    title: str
    measured: str
    tables: Sequence[str]
    lines: Sequence[Line]
    limits: Sequence[str]
    data: Any
    num_failed: int = 0
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of processes that aren't arms of a stage."""


def report_of(
    question: str,
    title: str,
    measured: str,
    results: Sequence[RaceResult],
    limits: Sequence[str],
) -> Report:
    """The report of a question that is answered by races."""
    lines = [line_of(target, result) for result in results for target in result.race.targets]
    tables = [race_text(result) for result in results]
    data = [race_data(result) for result in results]
    num_failed = sum(len(result.failed) for result in results)
    return Report(question, title, measured, tables, lines, limits, data, num_failed)


def race_text(result: RaceResult) -> str:
    """The race's table of arms, the arms that are missing and what the check found."""
    race = result.race
    rows = [["arm", "tokens/s: median (range)", *race.columns]]
    for name, readings in result.readings.items():
        cells = [name, Spread.of([reading.rate for reading in readings]).show()]
        for key in race.columns.values():
            values = [reading.facts[key] for reading in readings if key in reading.facts]
            cells.append(Spread.of(values).show() if values else "")
        rows.append(cells)
    parts = [f"## {race.title}", table(rows)]
    notes = [f"- {name}: no figure; {reason}." for name, reason in result.absent.items()]
    notes += [f"- {sentence}" for sentence in race.check(result.readings)]
    notes += [f"- {sentence}" for sentence in calm_text(result)]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def calm_text(result: RaceResult) -> list[str]:
    """How much others disturbed the turns that count, and how many turns did not."""
    turns = [reading for readings in result.readings.values() for reading in readings]
    if not turns:
        return []
    shares = [100 * reading.foreign_cpu for reading in turns]
    again = sum(reading.num_tries - 1 for reading in turns)
    middle, worst = statistics.median(shares), max(shares)
    return [
        f"Cores used by others in a turn: median {middle:.0f} %, most {worst:.0f} %; "
        f"{again} turns were taken again because it was more than "
        f"{100 * Patience.calm_share:.0f} %."
    ]


def race_data(result: RaceResult) -> dict[str, Any]:
    readings = {
        name: [{**asdict(reading), "rate": reading.rate} for reading in of]
        for name, of in result.readings.items()
    }
    return {"race": result.race.title, "readings": readings, "absent": result.absent}


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its heading."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def lines_table(lines: Sequence[Line]) -> str:
    """The table of the targets: work, target, figure, verdict."""
    rows = [[line.work, line.target, line.figure, line.verdict] for line in lines]
    return table([["work", "target", "figure: median (range)", "verdict"], *rows])
