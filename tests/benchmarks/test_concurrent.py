"""The question "concurrent": its graders, its judgement, and one small comparison for real."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from benchmarks import concurrent
from benchmarks.concurrent import Comparison, Turn, agreement
from benchmarks.family import RunClock
from benchmarks.grpo import (
    TASKS,
    PolicyRecord,
    Setting,
    StepRecord,
    Workload,
    body_of,
    grade_by_tests,
    variety,
)
from benchmarks.house import Patience
from tests.servers import TestServer

ADD = TASKS[0]
SMALL = Workload(
    num_steps=2, num_prompts=1, group_size=2, max_tokens=6, num_evaluated=1, evaluated_tokens=3
)
IMPATIENT = Patience.waiting(0.0)


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        (" a + b\n\n\nprint(add(1,", 1.0),
        (" a - b\n", 0.0),
        (" a if b == 1 else a + b\n", 0.5),
        (" a +\n", 0.0),
        (" input()\n", 0.0),
        (" exit(0)\n", 0.0),
    ],
)
def test_a_grader_runs_the_function(completion: str, share: float) -> None:
    reward = grade_by_tests(ADD, completion)
    assert reward == pytest.approx(share + 0.1 * variety(ADD, completion))


def test_a_body_ends_where_the_function_does_and_has_no_cut_line() -> None:
    assert (
        body_of(" a\n    b = 1\n\n    c = 2\ndef next():\n    pa") == " a\n    b = 1\n\n    c = 2"
    )
    assert body_of(" a\n    cut of") == " a"


def policy(number: int, *token_lists: tuple[int, ...], end: float = 1.0) -> PolicyRecord:
    steps = tuple(
        StepRecord((tokens,), (-1.0,) * len(tokens), 0.5, 2.0, 0.0, 1.0, 0.0, 1.0)
        for tokens in token_lists
    )
    return PolicyRecord(number, 0.0, end, steps, ((1,),), 0.0, 0.1, 0.1)


def test_equal_runs_agree_to_the_bit_and_others_until_their_samples_part() -> None:
    same, other = policy(0, (1, 2), (3, 4)), policy(1, (1, 2), (3, 4))
    assert agreement([same, other], [same, other]).is_exact
    parted = policy(1, (1, 2), (3, 5))
    first, second = parted.steps
    parted = replace(parted, steps=(replace(first, loss=0.75), replace(second, loss=9.0)))
    found = agreement([same, other], [same, parted])
    assert not found.is_exact
    assert (found.num_same_tokens, found.loss_gap, found.logprob_gap) == (1, 0.25, 0.0)
    assert found.num_graded_otherwise == 0


def test_a_policy_that_parts_because_of_its_grader_is_told_from_one_that_computed_otherwise() -> (
    None
):
    one = policy(0, (1, 2), (3, 4), (5, 6))
    first, second, third = one.steps
    later = replace(third, tokens_S=((5, 7),))
    other = replace(one, steps=(first, replace(second, reward=0.25, grad_norm=9.0), later))
    found = agreement([one], [other])
    assert (found.num_same_tokens, found.num_graded_otherwise) == (0, 1)
    assert found.grad_norm_gap == 0.0


def turn(*ends: float, peak: int = 2**30) -> Turn:
    policies = tuple(policy(i, (1, 2), end=end) for i, end in enumerate(ends))
    return Turn(policies, ((0.5, peak), (max(ends) - 0.1, 2 * peak)), 1.0, 1.0, 0.0)


def test_the_first_jobs_of_the_longest_queue_are_a_shorter_queue() -> None:
    alone = turn(10.0, 20.0, 30.0)
    assert Comparison(2, alone, turn(12.0, 12.5)).makespans == (20.0, 12.5)
    assert alone.peak_bytes(2) == 2**30
    assert alone.peak_bytes(3) == 2**31


def test_the_target_stands_on_the_measured_setting() -> None:
    found = [Comparison(2, turn(10.0, 20.0), turn(9.0, 10.0, peak=2**29))] * 2
    report = concurrent.report_of(
        concurrent.STUDY, [(setting, found) for setting in concurrent.SETTINGS]
    )
    verdicts = [line.verdict for line in report.lines]
    informed = ["for information", "for information", "met"]
    assert verdicts == [*informed, "met", "met", "met", *informed]
    assert "2.00x (2.00 to 2.00)" in report.tables[0]


def test_a_clock_leaves_out_the_time_in_which_nobody_could_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([100.0, 101.0, 161.0, 162.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = RunClock()
    assert [clock.now() for _ in range(3)] == [1.0, 1.0, 2.0]
    assert clock.paused_seconds == 60.0


@pytest.mark.integration
def test_two_small_policies_at_once_compute_what_they_do_alone(server: TestServer) -> None:
    setting = Setting("small", grade_by_tests, uses_processes=True)
    alone, at_once = (
        concurrent.turn_on(server, setting, SMALL, 2, together, IMPATIENT)
        for together in (False, True)
    )
    found = Comparison(2, alone, at_once)
    assert all(len(policy.steps) == SMALL.num_steps for policy in at_once.policies)
    assert min(at_once.train_seconds, at_once.serve_seconds) > 0
    assert 0.8 < found.memory_ratio < 1.2
    # Works this small share a micro-batch, so their sums are not added in the same order.
    assert found.agreement.logprob_gap < 0.5
    assert concurrent.text_of(setting, [found])
    assert concurrent.data_of(setting, [found])
