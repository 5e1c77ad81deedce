"""`openmint residency`: what host memory loaded, and what another would have, from its own log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from openmint.cli.output import JsonFlag, progress, show
from openmint.cli.remote import DEFAULT_DATA, DataOption
from openmint.errors import InvalidRequest
from openmint.residency.decisions import Decision, is_newest, read_decisions, times_of, uses_of
from openmint.residency.replay import orders, replay


@dataclass(frozen=True, slots=True)
class Replay:
    """The log's uses in an empty memory, under one order."""

    base: str
    """The first digits of its digest."""
    memory_mib: int
    order: str
    uses: int
    loads: int
    hits: str
    load_seconds: float


def register(app: typer.Typer) -> None:
    app.command()(residency)


def residency(
    data: DataOption = DEFAULT_DATA,
    memory_mib: Annotated[
        int | None, typer.Option(min=1, help="Host memory to try instead of the worker's, MiB.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay what workers were asked for: under our order of eviction, under others, and under the
    best that knows the future (`belady`).

    Safe beside a running server, whose last second may be missing.
    """
    folder = data / "residency"
    logs = [path for path in sorted(folder.glob("*.jsonl")) if is_newest(path)]
    if not logs:
        raise InvalidRequest(f"{data} holds no log of residency; give --data")
    found = []
    with progress("replaying") as display:
        task = display.add_task("replaying", total=len(logs))
        for path in logs:
            found += _replays(path.stem[:12], list(read_decisions(path)), memory_mib)
            display.advance(task)
    show(found, as_json=as_json, columns=list(Replay.__slots__))


def _replays(base: str, decisions: list[Decision], memory_mib: int | None) -> list[Replay]:
    uses, times = uses_of(decisions), times_of(decisions)
    starts = [each.num_bytes for each in decisions if each.kind == "start"]
    budget = memory_mib << 20 if memory_mib is not None else (starts or [0])[-1]
    largest = max((use.num_bytes for use in uses), default=0)
    if largest > budget:
        raise InvalidRequest(
            f"a revision of {largest} bytes was used; memory of {budget} bytes can't hold it"
        )
    results = {
        name: replay(uses, order, budget, lambda use: times.seconds(use.num_bytes))
        for name, order in orders(uses, times).items()
    }
    return [
        Replay(
            base=base,
            memory_mib=budget >> 20,
            order=name,
            uses=result.num_uses,
            loads=result.num_loads,
            hits=f"{100 * result.hit_share:.1f} %",
            load_seconds=round(result.load_seconds, 3),
        )
        for name, result in results.items()
    ]
