"""The questions that bring a service of their own, small and on a tiny base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import control, load
from benchmarks.control import Figures, Situation, Timing
from benchmarks.load import Answer, Size, Wish
from benchmarks.raw_http import Reply
from tests.servers import TestServer, running_server

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def tiny_server(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[[str], Path]
) -> Iterator[TestServer]:
    root, base = tmp_path_factory.mktemp("questions"), tiny_base("llama")
    with running_server(root, bases=(str(base),)) as server:
        yield replace(server, base=base.name)


def test_control_times_both_apis_alone_and_beside_others(tiny_server: TestServer) -> None:
    situations = (Situation("alone", 1, 0, 0.3, False), Situation("beside", 2, 3, 0.5, True))
    report = control.answer(tiny_server, 1, situations)
    assert len(report.lines) == 2 * 2 * 2
    assert {line.verdict for line in report.lines if "alone" in line.work} == {"for information"}
    assert {line.verdict for line in report.lines if "beside" in line.work} <= {"met", "missed"}
    for found in report.data["figures"]:
        (figures,) = found["repeats"]
        assert figures["rate"] > 0
        assert figures["whole_p50"] > figures["control_p50"] > figures["scheduler_p50"] > 0
    assert report.data["client_round_trip_ms"] > 0


def test_load_gives_everybody_their_own_answer(tiny_server: TestServer) -> None:
    report = load.answer(tiny_server, 2, Size(num_samples=20, num_polls=60))
    assert [line.figure for line in report.lines] == [
        "0 errors, 0 lost, 0 wrong of 40",
        "0 errors, 0 lost, 0 wrong of 120",
    ]
    assert {line.verdict for line in report.lines} == {"met"}
    assert report.data[0]["peak_files"] > 60


def test_an_answer_of_another_length_or_prompt_is_told_from_ones_own() -> None:
    wish = Wish((5, 6, 7), seed=0, max_tokens=2)
    answer = Answer((8, 9), (-1.0, -2.0))
    assert answer.is_for(wish, [-1.1, -2.0])
    assert not answer.is_for(wish, [-1.1, -2.5])
    assert not answer.is_for(Wish((5, 6, 7), 0, 3), [-1.0, -2.0])


def test_control_is_what_the_engine_does_not_explain() -> None:
    timings = [Timing(0.100, 0.090, 0.002), Timing(0.200, 0.180, 0.004)]
    figures = Figures.of(timings, 0.5, (1.0, 0.1))
    assert figures.rate == 4
    assert figures.control_p50 == pytest.approx(15.0)
    assert figures.scheduler_p50 == pytest.approx(3.0)


def test_the_raw_client_reads_server_timing() -> None:
    reply = Reply(200, {b"server-timing": b"engine;dur=12.5, scheduler;dur=0.250"}, b"{}")
    assert reply.timing_seconds == {"engine": 0.0125, "scheduler": 0.00025}
    assert Reply(200, {}, b"{}").timing_seconds == {}
