"""The frame of the benchmarks: order of turns, ratios, verdicts, and what a result page says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks import house
from benchmarks.house import (
    WARM_UP,
    ArmFailed,
    Line,
    Patience,
    Race,
    RaceResult,
    Reading,
    Report,
    Spread,
    Target,
    Unavailable,
    fastest,
    line_of,
    number,
    ratios,
    report_of,
    run_race,
    verdict,
)
from benchmarks.writing import Circumstances, page, write


@dataclass
class FakeArm:
    """Notes its turns; each takes as long as its rate says."""

    name: str
    turns: list[tuple[str, int]]
    rate: float = 10.0
    missing: str = ""
    fails_at: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        if self.missing:
            raise Unavailable(self.missing)

    def run(self, lap: int) -> Reading:
        self.turns.append((self.name, lap))
        if lap == self.fails_at:
            raise ArmFailed("failed: out of memory")
        return Reading(10 / self.rate, 10, self.facts)


IMPATIENT = Patience(settle_seconds=0.0, calm_share=float("inf"), wait_seconds=0.0)


def readings(*rates: float) -> list[Reading]:
    return [Reading(1.0, round(rate)) for rate in rates]


def result(race: Race, repeats: int = 3) -> RaceResult:
    return run_race(race, repeats, IMPATIENT)


def test_arms_take_turns_after_one_warm_up_each() -> None:
    turns: list[tuple[str, int]] = []
    arms = [FakeArm(name, turns) for name in "abc"]
    outcome = result(Race("race", arms), repeats=2)
    assert turns == [(name, lap) for lap in (WARM_UP, 0, 1) for name in "abc"]
    assert [reading.lap for reading in outcome.readings["b"]] == [0, 1]


def test_a_disturbed_turn_is_taken_again_on_another_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    shares = iter([0.6, 0.0, 0.0])

    def watched(arm: FakeArm, lap: int) -> tuple[Reading, float]:
        return arm.run(lap), next(shares)

    monkeypatch.setattr(house, "watched_turn", watched)
    patience = Patience(settle_seconds=0.0, wait_seconds=0.0)
    outcome = run_race(Race("race", [FakeArm("a", turns)]), 2, patience)
    assert turns == [("a", WARM_UP), ("a", 0), ("a", 1000), ("a", 1)]
    assert [(r.lap, r.num_tries, r.foreign_cpu) for r in outcome.readings["a"]] == [
        (1000, 2, 0.0),
        (1, 1, 0.0),
    ]
    assert "1 turns were taken again" in house.race_text(outcome)


def test_ratio_is_formed_repeat_by_repeat_before_its_median() -> None:
    ours, theirs = readings(100, 300, 200), readings(50, 100, 400)
    assert ratios(ours, theirs) == [2.0, 3.0, 0.5]
    race = Race("race", [], [Target("work", "ours", ("theirs",), 2.0)])
    line = line_of(race.targets[0], RaceResult(race, {"ours": ours, "theirs": theirs}, {}))
    assert line == Line("work", "≥ 2x", "2.00x (0.500 to 3.00)", "met")


def test_the_fastest_rival_by_median_is_the_one_to_beat() -> None:
    measured = {"lucky": readings(10, 10, 90), "steady": readings(20, 20, 20)}
    assert fastest(("lucky", "steady", "absent"), measured) == "steady"
    assert fastest(("absent",), measured) is None
    race = Race("race", [], [Target("work", "ours", ("lucky", "steady"), 2.0)])
    outcome = RaceResult(race, {"ours": readings(30, 30, 30), **measured}, {})
    assert line_of(race.targets[0], outcome).figure == "1.50x (1.50 to 1.50) against steady"
    assert line_of(race.targets[0], outcome).verdict == "missed"


@pytest.mark.parametrize(
    ("value", "bounds", "expected"),
    [
        (0.8, {"at_least": 0.8}, "met"),
        (0.799, {"at_least": 0.8}, "missed"),
        (15.0, {"at_most": 15.0}, "met"),
        (15.1, {"at_most": 15.0}, "missed"),
        (3.0, {}, "for information"),
    ],
)
def test_verdict(value: float, bounds: dict[str, float], expected: str) -> None:
    assert verdict(value, **bounds) == expected


def test_spread_and_numbers_show_three_digits() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)
    shown = [number(value) for value in (12345.6, 123.4, 12.34, 1.234, 0.1234, 0.0123, 0)]
    assert shown == ["12,346", "123", "12.3", "1.23", "0.123", "0.0123", "0"]


def test_an_arm_that_cannot_run_is_named_with_its_reason() -> None:
    turns: list[tuple[str, int]] = []
    arms = [FakeArm("ours", turns), FakeArm("rival", turns, missing="not installed: no cmake")]
    outcome = result(Race("race", arms, [Target("work", "ours", ("rival",), 2.0)]))
    assert {name for name, _ in turns} == {"ours"}
    assert not outcome.failed
    line = line_of(outcome.race.targets[0], outcome)
    assert (line.figure, line.verdict) == ("-", "not measured (rival: not installed: no cmake)")


def test_an_arm_that_breaks_ends_alone_and_leaves_no_figures() -> None:
    turns: list[tuple[str, int]] = []
    arms = [FakeArm("ours", turns), FakeArm("rival", turns, fails_at=1)]
    outcome = result(Race("race", arms))
    assert [lap for name, lap in turns if name == "ours"] == [WARM_UP, 0, 1, 2]
    assert [lap for name, lap in turns if name == "rival"] == [WARM_UP, 0, 1]
    assert list(outcome.readings) == ["ours"]
    assert outcome.failed == {"rival"}
    assert outcome.absent == {"rival": "failed: out of memory"}


@pytest.fixture
def report() -> Report:
    turns: list[tuple[str, int]] = []
    race = Race(
        title="Decode, 8 sequences",
        arms=[
            FakeArm("ours", turns, rate=400.0, facts={"whole_rate": 300.0}),
            FakeArm("rival", turns, rate=200.0),
            FakeArm("other", turns, missing="not installed: no compiler"),
        ],
        targets=[Target("decode, 8", "ours", ("rival", "other"), 2.0)],
        columns={"with prompts, tokens/s": "whole_rate"},
        check=lambda measured: [f"{len(measured)} arms ran."],
    )
    return report_of("decode", "Decoding", "What is measured.", [result(race)], ["One machine."])


@pytest.fixture
def circumstances() -> Circumstances:
    machine = {
        "cpu": "Some CPU",
        "architecture": "x86_64",
        "cores": 2,
        "flags": ["avx2", "avx512_bf16"],
        "caches": ["L2 1024K"],
        "memory_gib": 23.5,
        "system": "Linux 6.1",
    }
    return Circumstances(
        command="python -m benchmarks decode --repeats 3",
        commit="abc1234 + changes",
        date=datetime(2026, 11, 24, 12, 30, tzinfo=UTC),
        machine=machine,
        load_before=0.25,
        load_after=2.0,
        versions={"ours": {"python": "3.11.7", "torch": "2.13.0"}},
        environments={"ours": {"OMP_NUM_THREADS": "2"}, "rival": {}},
    )


def test_page_says_what_ran_where_and_how_it_went(
    report: Report, circumstances: Circumstances
) -> None:
    lines = page(report, circumstances).splitlines()
    assert lines[0] == "# Decoding"
    for line in (
        "- Command: `python -m benchmarks decode --repeats 3`",
        "- Commit: abc1234 + changes; 2026-11-24 12:30 UTC",
        "- Machine: 2 cores of Some CPU (x86_64; avx2, avx512_bf16; L2 1024K), 23.5 GiB, Linux 6.1",
        "- Load average: 0.25 before, 2.00 after",
        "- Versions: ours: python 3.11.7, torch 2.13.0",
        "- Environment: ours: OMP_NUM_THREADS=2; rival: ",
        "What is measured.",
        "| decode, 8 | ≥ 2x | 2.00x (2.00 to 2.00) against rival | met |",
        "## Decode, 8 sequences",
        "| arm | tokens/s: median (range) | with prompts, tokens/s |",
        "| ours | 400 (400 to 400) | 300 (300 to 300) |",
        "| rival | 200 (200 to 200) |  |",
        "- other: no figure; not installed: no compiler.",
        "- 2 arms ran.",
        "## Limits",
        "- One machine.",
    ):
        assert line in lines


def test_results_are_written_as_page_and_json(
    report: Report, circumstances: Circumstances, tmp_path: Path
) -> None:
    path = write(report, circumstances, tmp_path)
    assert path.name == "decode_cpu_202611.md"
    assert path.read_text() == page(report, circumstances)
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["commit"] == "abc1234 + changes"
    assert content["lines"][0]["verdict"] == "met"
    assert [r["rate"] for r in content["data"][0]["readings"]["ours"]] == [400.0] * 3
    assert content["data"][0]["absent"] == {"other": "not installed: no compiler"}
