"""The benchmark of plans: a layer's file, and the report of small checks and plans."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import plan
from benchmarks.plan import Check, planned, plans_of, report, write_sparse
from openmint.models.weights import Weights
from tests.workbench import random_model


def test_a_checkpoint_of_zeros_can_be_read_and_takes_no_disk(tmp_path: Path) -> None:
    shapes = {"a": (4096, 8192), "b": (3,), "c": (32, 2**20), "d": (2, 2)}
    write_sparse(tmp_path, shapes)
    weights = Weights(tmp_path, torch.bfloat16, torch.device("cpu"))
    for name, shape in shapes.items():
        rows = weights.part(name, (slice(0, 2),))
        assert rows.shape == (2, *shape[1:])
        assert not rows.any()
    files = list(tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_blocks * 512 for path in files) < 2**16


def test_a_large_checkpoint_is_in_several_files(tmp_path: Path) -> None:
    half = (plan.FILE_BYTES // 2,)
    write_sparse(tmp_path, {"a": half, "b": half, "c": half})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_errors_beyond_the_limit_are_missed_and_all_plans_are_listed(tmp_path: Path) -> None:
    checks = [
        Check("llama: weights", 100, 100),
        Check("a mixture of 3 million parameters", 98, 100),
        Check("X: a layer on one of 2 ranks", 90, 100),
    ]
    base = planned(random_model("deepseek-v3", tmp_path), "bfloat16")
    made = report(checks, {plan.LARGEST: {**plans_of(base), 2: "it doesn't fit"}})
    assert [line.verdict for line in made.lines] == ["met", "met", "missed"]
    assert [line.figure for line in made.lines] == ["0.000 %", "2.000 %", "10.000 %"]
    assert "- it doesn't fit." in made.tables[3]
    assert all(f"| {count} |" in made.tables[0] for count in plan.GPU_COUNTS)
