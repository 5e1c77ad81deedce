"""Each question's races, with stub arms: every target finds its arms, and every table is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import adapters, decode, training
from benchmarks.house import Arm, Patience, Race, Reading, report_of, run_race
from benchmarks.processes import Stage

FACTS = {
    "loss_per_token": 13.5,
    "optimizer_ms": 7.0,
    "whole_rate": 300.0,
    "first_tokens": [5, 6],
    "ways": {"qkv": "plain, 512 rows at once"},
}
IMPATIENT = Patience(settle_seconds=0.0, calm_share=float("inf"), wait_seconds=0.0)


@dataclass
class Stub:
    name: str

    def prepare(self) -> None:
        pass

    def run(self, lap: int) -> Reading:
        return Reading(1.0, 100, FACTS)


class StubStage(Stage):
    def arm(self, host: str, name: str, kind: str, **settings: Any) -> Arm:
        return Stub(name)


RACES: dict[str, Callable[[Stage], list[Race]]] = {
    "training": lambda stage: training.races(stage, "base"),
    "decode": lambda stage: [decode.decode_race(stage, "base", n) for n in decode.ROUNDS],
    "adapters": lambda stage: [adapters.adapters_race(stage, "base", "folder", ["a", "b"])],
}


@pytest.mark.parametrize("question", RACES)
def test_every_target_finds_its_arms(question: str) -> None:
    races = RACES[question](StubStage())
    for race in races:
        names = [arm.name for arm in race.arms]
        assert len(set(names)) == len(names)
        assert {n for t in race.targets for n in (t.arm, *t.rivals)} <= set(names)
    report = report_of(question, "Title", "", [run_race(r, 2, IMPATIENT) for r in races], [])
    missing = [line.work for line in report.lines if line.verdict.startswith("not measured")]
    assert missing == []
    assert all(line.figure.startswith("1.00x") for line in report.lines if line.figure != "-")
    assert len(report.tables) == len(races)
