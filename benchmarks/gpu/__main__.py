"""Asks every question, each in a process of its own and within its share of the time.

`python -m benchmarks.gpu [question ...] [--tiny] [--minutes M]`. Results go to $OUT, or to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.report import PROJECT, Answer, circumstances, page, write
from benchmarks.gpu.scale import FULL, TINY, Scale

SHARES = {
    "kernels": 0.10,
    "graphs": 0.06,
    "training": 0.12,
    "decode": 0.10,
    "adapters": 0.12,
    "mixtures": 0.20,
    "handoff": 0.20,
    "grpo": 0.15,
}
"""Which part of the time each question may take; what one leaves, the next ones may use."""


def ask(question: str, scale: Scale, limit_seconds: float) -> Answer:
    """Run one question's process; whatever it measured in its time stands."""
    module = importlib.import_module(f"benchmarks.gpu.{question}")
    answer = Answer(question, module.TITLE, module.MEASURED)
    started_at = time.monotonic()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu.question", question, scale.name, str(path)]
        status = run_within(command, limit_seconds)
        lines = path.read_text().splitlines() if path.exists() else []
    answer.seconds = time.monotonic() - started_at
    for row in map(json.loads, lines):
        if "traceback" in row:
            answer.failure = row["traceback"]
        else:
            answer.rows.append(row)
    if status is None:
        answer.failure = f"stopped: its {limit_seconds:.0f} s were over; the rows above stand"
    elif status and not answer.failure:
        answer.failure = f"its process ended with status {status}"
    return answer


def do_without(answer: Answer) -> None:
    """A fast way that failed its question is switched off for the questions that follow."""
    switch = getattr(importlib.import_module(f"benchmarks.gpu.{answer.question}"), "SWITCH", None)
    if switch and not (answer.is_whole and all(row.get("agrees", True) for row in answer.rows)):
        os.environ[switch] = "0"
        answer.consequence = f"From here on {switch}=0."


def run_within(command: Sequence[str], limit_seconds: float) -> int | None:
    """The command's exit status, or None when its time was over; it takes its children along."""
    process = subprocess.Popen(command, cwd=PROJECT, start_new_session=True)
    try:
        return process.wait(max(1.0, limit_seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every question was answered to its end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(SHARES))
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in a minute: does it run?")
    parser.add_argument("--minutes", type=float, default=9.0, help="all questions together")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.questions) - set(SHARES)):
        parser.error(f"unknown question {unknown[0]!r}; known: {', '.join(SHARES)}")
    scale = TINY if given.tiny else FULL
    at = {
        "scale": scale.name,
        "rank of trained adapters": str(scale.rank),
        "command": command_of(given),
        **circumstances(scale.device),
    }
    stem = f"gpu_{'tiny' if given.tiny else 'qwen3_4b'}_{time.strftime('%Y%m')}"
    folder = Path(os.environ.get("OUT") or PROJECT / "benchmarks" / "results")
    answers: list[Answer] = []
    ends_at = time.monotonic() + 60 * given.minutes
    asked = given.questions or list(SHARES)
    for i, question in enumerate(asked):
        share = SHARES[question] / sum(SHARES[later] for later in asked[i:])
        print(f"{question}: running", flush=True)
        answers.append(ask(question, scale, share * (ends_at - time.monotonic())))
        do_without(answers[-1])
        path = write(folder, stem, at, answers)  # after each: nothing measured is lost
    print(page(at, answers))
    print(f"written to {path} and {path.with_suffix('.json').name}")
    return int(not all(answer.is_whole for answer in answers))


def command_of(given: argparse.Namespace) -> str:
    words = ["benchmarks/gpu/run.sh", *given.questions, *(["--tiny"] if given.tiny else [])]
    return " ".join([*words, f"--minutes {given.minutes:g}"])


if __name__ == "__main__":
    sys.exit(main())
