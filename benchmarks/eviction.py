"""Which revision should leave memory? The orders of eviction on seven traces, and against Belady.

`python -m benchmarks eviction`. Uses are replayed through the books that workers keep
(`openmint/residency/replay.py`); what a load takes is learned from real ones, and first checked.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, number, table, verdict
from benchmarks.processes import BASES, Stage
from benchmarks.traces import RANKS, SIZES, TRACES
from openmint.config import WorkerConfig
from openmint.engine.formats import AdapterArchive, encode_revision
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.models.embedded import embedded_base
from openmint.models.loader import load_model
from openmint.residency.decisions import MOST_RECALLED
from openmint.residency.eviction import LeastWorth
from openmint.residency.foretelling import Foretelling
from openmint.residency.load_times import LoadTimes
from openmint.residency.replay import Replayed, Use, orders, replay
from openmint.residency.tier import Tier
from openmint.store.folder_store import FolderStore
from openmint.types import Digest, LoraSpec

ORDERS = {"LRU": "lru", "LFU": "lfu", "ours": "ours", "Belady": "belady"}
MEMORY_SHARE = 0.1
"""Of all revisions' bytes."""
MEMORY_BYTES = int(MEMORY_SHARE * sum(SIZES))
RESTARTED_AT, NUM_AFTER = 30_000, 3_000
"""When a trace's worker dies, and the uses after it that are looked at."""
NUM_REAL, NUM_REAL_USES, NUM_LEARNED = 60, 600, 120
MOST_ERROR = 0.05
LIVES = {
    "knows nothing": (False, False),
    "learns": (True, False),
    "learns and guesses": (True, True),
}
"""Whether a new worker learns from the log, and whether it loads ahead."""
FAMILIES = {
    "uniform": ["uniform"],
    "Zipf 0.8 to 1.2": ["Zipf 0.8", "Zipf 1.0", "Zipf 1.2"],
    "drifting hot set": ["drifting hot set"],
    "rollout wave": ["rollout wave"],
    "post-deploy spike": ["post-deploy spike"],
}
"""The five traces of the target; all of a family's must be won."""
MEASURED = (
    "Seconds of loading that a trace of 60,000 uses causes in a memory that holds a tenth of 2,000 "
    f"revisions' bytes (new revisions come on top), ranks {RANKS} of SmolLM2-135M; median of the "
    "seeds. LRU, LFU and ours (`LeastWorth`, as workers run it): `openmint/residency/eviction.py`. "
    "Belady evicts what is used again last, with the future known, whatever a load costs. "
    "What a load takes: the line over its bytes that real loads gave."
)


class RealLoads:
    """Revisions of all ranks in a real store, read, checked and decoded as a worker does."""

    def __init__(self, folder: Path) -> None:
        directory, config = embedded_base(BASES), WorkerConfig()
        _, base = load_model("base", directory, Digest("sha256:" + "0" * 64), config)
        self._archive = AdapterArchive(FolderStore(folder), base)
        generator = torch.Generator().manual_seed(0)
        blobs = FolderStore(folder)
        self.uses: list[Use] = []
        for index in range(NUM_REAL):
            spec = LoraSpec(RANKS[index % len(RANKS)], train_unembed=False)
            layout = AdapterLayout(spec, base.targets_of(spec))
            flat_P = torch.empty(layout.num_params, dtype=torch.bfloat16)
            flat_P.normal_(0.0, 0.02, generator=generator)
            weights = AdapterWeights(layout, flat_P)
            digest = blobs.put(encode_revision(weights, base))
            self.uses.append(Use(digest, weights.num_bytes))

    def load(self, use: Use) -> float:
        """Seconds that the load took."""
        started_at = time.monotonic()
        self._archive.load_revision(use.revision)
        return time.monotonic() - started_at

    def learned(self) -> LoadTimes:
        times = LoadTimes()
        for _ in range(NUM_LEARNED // NUM_REAL):
            for use in self.uses:
                times.learn(use.num_bytes, self.load(use))
        return times


def calibration(repeats: int) -> tuple[LoadTimes, list[dict[str, float]]]:
    """Load times, and for each repeat the loading that was foretold and that was measured."""
    with tempfile.TemporaryDirectory() as folder:
        real = RealLoads(Path(folder))
        budget = sum(use.num_bytes for use in real.uses) // 4
        found = []
        for seed in range(repeats):
            ranks = np.random.default_rng(seed).zipf(1.3, 10 * NUM_REAL_USES)
            picked = ranks[ranks <= NUM_REAL][:NUM_REAL_USES] - 1
            uses = [real.uses[index] for index in picked]
            times = real.learned()
            foretold = replay(uses, LeastWorth(times), budget, foreseen(times)).load_seconds
            measured = replay(uses, LeastWorth(times), budget, real.load).load_seconds
            found.append({"foretold": foretold, "measured": measured})
            print(f"calibration {seed + 1}: {found[-1]}", flush=True)
    return times, found


def foreseen(times: LoadTimes) -> Callable[[Use], float]:
    return lambda use: times.seconds(use.num_bytes)


def scores(times: LoadTimes, repeats: int) -> dict[str, dict[str, list[Replayed]]]:
    """By trace and order, one replay per seed."""
    found: dict[str, dict[str, list[Replayed]]] = {}
    for trace, make in TRACES.items():
        by_order = found[trace] = {name: [] for name in ORDERS}
        for seed in range(repeats):
            uses = make(seed)
            kept = orders(uses, times, seed)
            for name, key in ORDERS.items():
                by_order[name].append(replay(uses, kept[key], MEMORY_BYTES, foreseen(times)))
        print(f"{trace}: ours {seconds_of(by_order['ours']).show(' s')}", flush=True)
    return found


def restarted(
    before: Sequence[Use], after: Sequence[Use], times: LoadTimes, *, learns: bool, guesses: bool
) -> tuple[float, int]:
    """Seconds of loading that the uses after a restart wait for in a memory that is empty then, and
    the loads that nobody waits for, until memory is full. All of them are made before the first
    use: a worker's first seconds are enough for hundreds."""
    order = LeastWorth(times)
    tier, book = Tier(MEMORY_BYTES, order), Foretelling(order)
    for use in before[-MOST_RECALLED:] if learns else ():
        tier.use(use.revision)
    sizes = {use.revision: use.num_bytes for use in (*before, *after)}
    for revision in {use.revision for use in before[-MOST_RECALLED:]} if learns else ():
        book.note(revision, sizes[revision])

    while guesses and (guess := book.take(tier.free_bytes)) is not None:
        tier.admit(guess, sizes[guess])
    num_guesses, waited = len(tier), 0.0
    for use in after:
        tier.use(use.revision)
        if use.revision not in tier:
            waited += times.seconds(use.num_bytes)
            for gone in tier.room_for(use.num_bytes) or ():
                tier.evict(gone)
            tier.admit(use.revision, use.num_bytes)
    return waited, num_guesses


def restarts(times: LoadTimes, repeats: int) -> dict[str, dict[str, list[tuple[float, int]]]]:
    """By trace and by what the new worker does, one restart per seed."""
    found: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for trace, make in TRACES.items():
        found[trace] = {name: [] for name in LIVES}
        for seed in range(repeats):
            uses = make(seed)
            before, after = uses[:RESTARTED_AT], uses[RESTARTED_AT:][:NUM_AFTER]
            for name, (learns, guesses) in LIVES.items():
                ended = restarted(before, after, times, learns=learns, guesses=guesses)
                found[trace][name].append(ended)
        print(f"{trace}, restarted: {found[trace]}", flush=True)
    return found


def seconds_of(replays: Sequence[Replayed]) -> Spread:
    return Spread.of([each.load_seconds for each in replays])


def ratio(ours: Sequence[Replayed], theirs: Sequence[Replayed]) -> Spread:
    pairs = zip(ours, theirs, strict=True)
    return Spread.of([mine.load_seconds / other.load_seconds for mine, other in pairs])


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: nothing here is a race between processes."""
    times, calibrated = calibration(repeats)
    found, restarted_found = scores(times, repeats), restarts(times, repeats)
    error = Spread.of([abs(1 - each["foretold"] / each["measured"]) for each in calibrated])
    won = [
        family
        for family, traces in FAMILIES.items()
        if all(ratio(found[t]["ours"], found[t]["LRU"]).high < 1 for t in traces)
    ]
    lines = [
        Line(
            "simulator: error of the loading that it foretells",
            f"< {100 * MOST_ERROR:g} %",
            Spread(100 * error.median, 100 * error.low, 100 * error.high).show(" %"),
            verdict(error.median, at_most=MOST_ERROR),
        ),
        Line(
            "eviction: traces on which ours loads less than LRU, with every seed",
            "≥ 4 of 5",
            f"{len(won)} of {len(FAMILIES)}",
            verdict(len(won), at_least=4),
        ),
    ]
    head = [
        "trace",
        *(f"{name}, s (hits)" for name in ORDERS),
        "ours / LRU",
        "ours / LFU",
        "regret",
    ]
    rows = [[trace, *_cells(by_order)] for trace, by_order in found.items()]
    return Report(
        question="eviction",
        title="Which revision leaves memory, and what that costs",
        measured=MEASURED,
        tables=[table([head, *rows]), table(_restart_rows(restarted_found))],
        lines=lines,
        limits=[
            "Traces are made, not recorded. Loads come from a warm page cache, one at a time.",
            "After a restart all guesses are made before the first use; requests that come sooner "
            "wait for more loads.",
            "Belady's order ignores what a load costs; a dearer one could be below it.",
        ],
        data={
            "calibration": calibrated,
            "traces": {
                trace: {
                    name: [[each.load_seconds, each.hit_share] for each in replays]
                    for name, replays in by_order.items()
                }
                for trace, by_order in found.items()
            },
            "restarts": restarted_found,
        },
        versions={"books": versions(("torch", "numpy"))},
    )


def _cells(by_order: dict[str, list[Replayed]]) -> list[str]:
    cells = []
    for name in ORDERS:
        hits = Spread.of([each.hit_share for each in by_order[name]])
        cells.append(f"{number(seconds_of(by_order[name]).median)} ({100 * hits.median:.0f} %)")
    for name in ("LRU", "LFU"):
        cells.append(ratio(by_order["ours"], by_order[name]).show())
    regret = ratio(by_order["ours"], by_order["Belady"]).median - 1
    return [*cells, f"{100 * regret:.0f} %"]


def _restart_rows(found: dict[str, dict[str, list[tuple[float, int]]]]) -> list[list[str]]:
    """Seconds of loading that the uses after a restart wait for, and the guesses made meanwhile."""
    rows = [[f"after a restart, {NUM_AFTER} uses", *(f"{name}, s" for name in LIVES), "guesses"]]
    for trace, by_life in found.items():
        waited = [Spread.of([each[0] for each in by_life[name]]).median for name in LIVES]
        guesses = Spread.of([each[1] for each in by_life["learns and guesses"]]).median
        rows.append([trace, *(number(seconds) for seconds in waited), number(guesses)])
    return rows
