"""Where do results go? A page for people and a JSON file for programs, under benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.house import Report, lines_table
from benchmarks.machine import PROJECT, machine_text

RESULTS = PROJECT / "benchmarks" / "results"


@dataclass(frozen=True)
class Circumstances:
    """All that a reader needs to judge a figure, or to get it again."""

    command: str
    commit: str
    date: datetime
    machine: Mapping[str, Any]
    load_before: float
    load_after: float
    versions: Mapping[str, Mapping[str, str]]
    """Of each process: package -> version."""
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of each process: the variables that change how fast it is."""


def page(report: Report, at: Circumstances) -> str:
    """The result as Markdown."""
    facts = [
        f"- Command: `{at.command}`",
        f"- Commit: {at.commit}; {at.date:%Y-%m-%d %H:%M} UTC",
        f"- Machine: {machine_text(dict(at.machine))}",
        f"- Load average: {at.load_before:.2f} before, {at.load_after:.2f} after",
        f"- Versions: {by_process(at.versions, ' ')}",
        f"- Environment: {by_process(at.environments, '=')}",
    ]
    parts = [
        f"# {report.title}",
        "\n".join(facts),
        report.measured,
        lines_table(report.lines),
        *report.tables,
        "## Limits",
        "\n".join(f"- {limit}" for limit in report.limits),
    ]
    return "\n\n".join(parts) + "\n"


def by_process(found: Mapping[str, Mapping[str, str]], joint: str) -> str:
    return "; ".join(
        f"{process}: " + ", ".join(f"{name}{joint}{value}" for name, value in values.items())
        for process, values in found.items()
    )


def write(report: Report, at: Circumstances, folder: Path = RESULTS) -> Path:
    """Write page and JSON file; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.question}_cpu_{at.date:%Y%m}.md"
    path.write_text(page(report, at))
    content = {
        "question": report.question,
        **asdict(at),
        "date": at.date.isoformat(),
        "lines": [asdict(line) for line in report.lines],
        "data": report.data,
    }
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    return path
