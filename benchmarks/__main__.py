"""Is the engine at this machine's limit? Runs the benchmarks and prints one table.

`python -m benchmarks [question ...] [--repeats N] [--no-rivals] [--patience SECONDS]
[--largest N]`; without a question, all of them. Each writes its page under benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.house import PATIENT, Patience, Report, lines_table
from benchmarks.machine import commit, load_average, machine_facts, today
from benchmarks.processes import BASES, LARGEST, Stage
from benchmarks.writing import RESULTS, Circumstances, write
from openmint.models.embedded import embedded_base

QUESTIONS = (
    "training",
    "decode",
    "mixtures",
    "replay",
    "adapters",
    "handoff",
    "durability",
    "eviction",
    "wave",
    "packed",
    "routing",
    "startup",
    "control",
    "load",
    "concurrent",
    "concurrent_experts",
    "catalog",
    "plan",
)
"""Modules of this package with `ask(stage, repeats)`."""


def run(question: str, given: argparse.Namespace) -> Report:
    """Answer one question and write its result."""
    module = importlib.import_module(f"benchmarks.{question}")
    embedded_base(BASES)  # converted before anything is timed, and before folders point to it
    load_before, commit_before = load_average(), commit()
    patience = Patience.waiting(given.patience)
    with Stage(not given.no_rivals, patience, given.largest) as stage:
        report: Report = module.ask(stage, given.repeats)
        versions = {**stage.versions, **report.versions}
        environments = stage.environments
    at = Circumstances(
        command=command_of(question, given),
        commit=commit_before,
        date=today(),
        machine=machine_facts(),
        load_before=load_before,
        load_after=load_average(),
        versions=versions,
        environments=environments,
    )
    print(f"{question}: see {write(report, at, given.results)}\n", flush=True)
    return report


def command_of(question: str, given: argparse.Namespace) -> str:
    """The command that runs this question again, as it ran now."""
    command = f"python -m benchmarks {question} --repeats {given.repeats}"
    if given.patience != PATIENT.wait_seconds:
        command += f" --patience {given.patience:g}"
    if given.largest != LARGEST:
        command += f" --largest {given.largest}"
    return f"{command} --no-rivals" if given.no_rivals else command


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every arm ran or can't run here, whatever the verdicts; 1 when one broke."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-rivals", action="store_true", help="run our arms and ceilings only")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENT.wait_seconds,
        metavar="SECONDS",
        help="how long a turn waits for other processes to leave the cores idle; 0: not at all",
    )
    parser.add_argument(
        "--largest",
        type=int,
        default=LARGEST,
        metavar="N",
        help="most revisions that `catalog` makes; 1000000 takes 40 minutes and 20 GB",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.questions) - set(QUESTIONS)):
        parser.error(f"unknown question {unknown[0]!r}; known: {', '.join(QUESTIONS)}")
    reports = []
    for question in given.questions or QUESTIONS:
        print(f"{question}: running", flush=True)
        reports.append(run(question, given))
    print(lines_table([line for report in reports for line in report.lines]))
    return int(any(report.num_failed for report in reports))


if __name__ == "__main__":
    sys.exit(main())
