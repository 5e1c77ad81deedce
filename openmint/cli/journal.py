"""`openmint journal`: what the logs of updates hold, and whether it is what was written."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from openmint.cli.output import EXIT_FAILED, JsonFlag, progress, show
from openmint.cli.remote import DEFAULT_DATA, DataOption
from openmint.errors import InvalidRequest
from openmint.journal.update_log import Segment, segments

app = typer.Typer(
    name="journal", help="Look at the journal of a data folder.", no_args_is_help=True
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One file of a log."""

    file: str
    updates: int
    runs: int
    num_bytes: int
    cut_bytes: int
    """At its end, of a write that did not end: never acknowledged."""
    damaged: int
    """Places in its middle that are not what was written."""


@app.command()
def verify(data: DataOption = DEFAULT_DATA, as_json: JsonFlag = False) -> None:
    """Read every logged update and compare it with its digest; exit 1 when one is damaged.

    Safe beside a running server, whose last write may show as a cut end.
    """
    folder = data / "journal"
    if not folder.is_dir():
        raise InvalidRequest(f"{data} holds no journal; give --data")
    paths = [path for base in sorted(folder.iterdir()) if base.is_dir() for path in segments(base)]
    verdicts = []
    with progress("reading") as display:
        task = display.add_task("reading", total=len(paths))
        for path in paths:
            segment = Segment.read(path, with_bodies=True)
            verdicts.append(_verdict(str(path.relative_to(folder)), segment))
            display.advance(task)
    show(verdicts, as_json=as_json, columns=list(Verdict.__slots__))
    if any(verdict.damaged for verdict in verdicts):
        raise typer.Exit(EXIT_FAILED)


def _verdict(name: str, segment: Segment) -> Verdict:
    middle = [damage for damage in segment.damages if not damage.is_tail]
    return Verdict(
        file=name,
        updates=len(segment.updates),
        runs=len({frame.head["run"] for frame in segment.updates}),
        num_bytes=segment.path.stat().st_size,
        cut_bytes=sum(damage.num_bytes for damage in segment.damages if damage.is_tail),
        damaged=len(middle) + len(segment.bad_bodies),
    )
