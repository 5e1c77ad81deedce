"""The GPU suite: its tiny run on the CPU, what it needs of a machine, how it survives failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu.report import PROJECT, Answer, page, show
from benchmarks.gpu.scale import TINY

TABLES = {
    "kernels": {"kernels"},
    "graphs": {"graphs"},
    "training": {"this device", "training"},
    "decode": {"decode"},
    "adapters": {"adapters"},
    "mixtures": {
        "experts, training",
        "experts, decode",
        "experts, one adapter",
        "latents, decode",
    },
    "handoff": {
        "arms",
        "four definitions",
        "ratio until T tokens, make + load + T at the warm rate",
        "parity with the adapter, log-probabilities of one prompt",
        "memory",
    },
    "grpo": {"makespan", "equality with the solo runs"},
}
ABSENT = ("fastapi", "llvmlite", "numba", "psutil", "pydantic", "sqlalchemy", "structlog")
"""Packages of ours that a machine with torch and transformers alone doesn't have."""


def test_one_call_answers_every_question_at_tiny_size(tmp_path: Path) -> None:
    done = subprocess.run(
        [PROJECT / "benchmarks" / "gpu" / "run.sh", "--tiny", "--minutes", "4"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu_tiny_*.json")
    written = json.loads(path.read_text())
    answers = {answer["question"]: answer for answer in written["answers"]}
    assert list(answers) == list(suite.SHARES)
    for question, tables in TABLES.items():
        assert {row["table"] for row in answers[question]["rows"]} == tables
    equal = [row for row in answers["grpo"]["rows"] if row["table"].startswith("equality")]
    assert [row["policies"] for row in equal] == list(TINY.grpo.policies)
    assert all(row["loss, largest relative gap"] < 1e-4 for row in equal)
    assert all(row["weights, largest relative gap"] < 1e-4 for row in equal)
    latents = [row for row in answers["mixtures"]["rows"] if row["table"].startswith("latents")]
    assert all(row["largest gap"] < 1e-4 for row in latents)
    parity = [row for row in answers["handoff"]["rows"] if row["table"].startswith("parity")]
    assert all(row["largest gap"] < 1e-4 for row in parity)
    assert "four definitions" in path.with_suffix(".md").read_text()


def test_a_bare_machine_can_import_all_that_the_suite_runs() -> None:
    modules = [f"benchmarks.gpu.{name}" for name in ("__main__", "question", *suite.SHARES)]
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    code += "".join(f"import {module}\n" for module in modules)
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)


def test_without_numba_a_cpu_kernel_says_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None\n"
        "import torch\nfrom openmint.kernels import logprobs\nlogprobs.norms(torch.zeros(1, 8))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert "needs numba: `pip install numba`" in done.stderr


def test_a_question_that_breaks_keeps_its_rows_and_shows_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        suite, "run_within", lambda command, seconds: leave(command, [{"table": "t", "n": 1}])
    )
    answer = suite.ask("decode", TINY, 10.0)
    assert answer.rows == [{"table": "t", "n": 1}]
    assert answer.failure == "stopped: its 10 s were over; the rows above stand"
    row = {"traceback": "Traceback: out of memory"}
    monkeypatch.setattr(suite, "run_within", lambda command, seconds: leave(command, [row], 1))
    answer = suite.ask("decode", TINY, 10.0)
    assert "out of memory" in page({"scale": "tiny"}, [answer])


def test_a_fast_way_that_disagrees_is_switched_off_for_what_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENMINT_TRITON", "1")
    row = {"table": "kernels", "kernel": "norm", "agrees": True}
    suite.do_without(Answer("kernels", "", "", [row]))
    suite.do_without(Answer("decode", "", "", [], failure="stopped"))
    assert os.environ["OPENMINT_TRITON"] == "1"
    worse = Answer("kernels", "Kernels", "", [{**row, "agrees": False}])
    suite.do_without(worse)
    assert os.environ["OPENMINT_TRITON"] == "0"
    assert "From here on OPENMINT_TRITON=0." in page({"scale": "tiny"}, [worse])


def leave(
    command: list[str], rows: list[dict[str, object]], status: int | None = None
) -> int | None:
    """What a question's process leaves behind."""
    Path(command[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return status


def test_a_process_whose_time_is_over_is_stopped() -> None:
    assert suite.run_within([sys.executable, "-c", "import time; time.sleep(60)"], 1.0) is None
    assert suite.run_within([sys.executable, "-c", "raise SystemExit(3)"], 30.0) == 3


def test_numbers_of_a_page() -> None:
    assert [show(value) for value in (None, 12, 1234.5, 0.12345, "A")] == [
        "-",
        "12",
        "1,234",
        "0.1235",
        "A",
    ]
    answer = Answer("q", "Title", "What.", [{"table": "t", "a": 1}, {"table": "t", "b": 2.0}])
    assert "| a | b |\n| --- | --- |\n| 1 | - |\n| - | 2 |" in page({"scale": "tiny"}, [answer])


def test_the_tree_stays_small_enough_to_travel() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    sizes = [(PROJECT / name).stat().st_size for name in listed.stdout.split("\0") if name]
    assert sum(sizes) < 64 * 2**20
