"""Arms in processes of their own: turns by JSON lines, and when all sequences decode."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import processes, rivals
from benchmarks.arms.steps import StepLog, decode_answer, prompts
from benchmarks.house import Patience, Race, run_race
from benchmarks.processes import Host, Stage
from benchmarks.rivals import NotInstalled, Rival, install

IMPATIENT = Patience(settle_seconds=0.0, calm_share=float("inf"), wait_seconds=0.0)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    hosts = {
        "toy": Host("tests.benchmarks.toy_arm"),
        "rival": Host("tests.benchmarks.toy_arm", rival="peft"),
    }
    monkeypatch.setattr(processes, "HOSTS", hosts)
    monkeypatch.setattr(processes, "LOGS", processes.PROJECT / ".data" / "benchmarks" / "test-logs")
    return Stage(use_rivals=False)


def test_one_process_hosts_arms_that_keep_their_settings(stage: Stage) -> None:
    with stage:
        fast = stage.arm("toy", "fast", "toy", tokens=300)
        slow = stage.arm("toy", "slow", "toy", tokens=100)
        outcome = run_race(Race("race", [fast, slow]), repeats=2, patience=IMPATIENT)
    assert [reading.rate for reading in outcome.readings["fast"]] == [300.0, 300.0]
    assert [reading.facts["said"] for reading in outcome.readings["slow"]] == [0, 1]
    assert outcome.readings["fast"][0].facts["pid"] == outcome.readings["slow"][0].facts["pid"]


def test_what_goes_wrong_in_a_process_is_told_and_the_others_go_on(stage: Stage) -> None:
    with stage:
        arms = [
            stage.arm("toy", "good", "toy", tokens=1),
            stage.arm("toy", "bad", "toy", tokens=0),
            stage.arm("rival", "rival", "toy", tokens=1),
        ]
        outcome = run_race(Race("race", arms), repeats=1, patience=IMPATIENT)
    assert list(outcome.readings) == ["good"]
    assert "ValueError: no tokens" in outcome.absent["bad"]
    assert outcome.absent["rival"] == "left out by --no-rivals"
    assert outcome.failed == {"bad"}


def test_a_process_that_dies_is_a_failed_arm(stage: Stage) -> None:
    with stage:
        arm = stage.arm("toy", "mortal", "toy", tokens=-1)
        outcome = run_race(Race("race", [arm]), repeats=1, patience=IMPATIENT)
    assert "ended with code 3" in outcome.absent["mortal"]


def test_a_rival_that_lacks_a_program_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rivals, "FOLDER", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(NotInstalled, match="needs c\\+\\+ or g\\+\\+ on PATH"):
        install(Rival("llama", (), needs=(("c++", "g++"),)))
    assert not (tmp_path / "llama").exists()


def test_only_steps_of_all_sequences_count_as_decoding() -> None:
    log = StepLog(num_sequences=2, started_at=0.0)
    # A prompt, the other prompt beside a first decode, two full steps, then one has ended.
    log.ends = [(1.0, 1), (3.0, 2), (3.5, 2), (4.0, 2), (4.3, 1)]
    assert log.decode == (1.0, 4)
    assert log.whole == (4.3, 8)
    answer = decode_answer([log, log], [5, 6])
    assert (answer["seconds"], answer["tokens"]) == (2.0, 8)
    assert answer["whole_rate"] == pytest.approx(8 / 4.3)


def test_prompts_are_the_same_for_every_arm_and_new_in_every_repeat() -> None:
    assert (prompts(8, 64, 2, 1) == prompts(8, 64, 2, 1)).all()
    rows = {
        row.tobytes()
        for count in (1, 8)
        for repeat in (-1, 0, 1)
        for round_ in (0, 1)
        for row in prompts(count, 64, repeat, round_)
    }
    assert len(rows) == 9 * 3 * 2
