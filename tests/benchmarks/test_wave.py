"""What the wave and the routing reports make of answers, refusals and strangers' answers."""

from collections.abc import Mapping

from benchmarks import routing, wave
from benchmarks.house import Report
from benchmarks.routing import Drive
from benchmarks.wave import LADDER, Answer, Burst, Figures, Tiers

OWN, REFUSED, STRANGE = Answer(1.0, 200, True), Answer(1.0, 503, False), Answer(1.0, 200, False)


def by_work(report: Report) -> Mapping[str, tuple[str, str]]:
    return {line.work: (line.figure, line.verdict) for line in report.lines}


def figures(*answers: Answer) -> Figures:
    burst = Burst(answers, 2.0)
    tiers = Tiers(cold=1.2, host=1.1, slot=1.0)
    return Figures([tiers], (0.020, 0.010), dict.fromkeys(LADDER, burst), burst, 0.95)


def test_a_wave_that_is_answered_or_refused_has_lost_nothing() -> None:
    lines = by_work(wave.report(figures(OWN, REFUSED)))
    assert lines["wave: lost, or answered by another adapter"] == ("0", "met")
    assert {verdict for _, verdict in lines.values()} == {"met", "missed"}
    figure, verdict = lines["wave: what one more cold adapter adds, over a load alone"]
    assert figure.startswith("0.312") and verdict == "missed"  # (1.2 - 1) / 64 / 0.01
    assert [work for work, (_, verdict) in lines.items() if verdict == "missed"] == [
        "wave: what one more cold adapter adds, over a load alone"
    ]


def test_another_adapters_answer_is_a_lost_request() -> None:
    lines = by_work(wave.report(figures(OWN, STRANGE)))
    num_bursts = len(LADDER) + 1
    found = lines["wave: lost, or answered by another adapter"]
    assert found == (str(num_bursts), "missed")


def test_routing_compares_loads_and_counts_the_lost() -> None:
    ours, theirs = Drive(10.0, [OWN, REFUSED], [3, 3]), Drive(15.0, [OWN, OWN], [6, 6])
    lines = by_work(routing.report({"residency": [ours], "sticky": [theirs]}))
    assert lines["routing: requests lost"] == ("1", "missed")
    assert lines["routing by residency: bytes loaded, over sticky's"][0].startswith("0.5")
    assert lines["routing by residency: requests per second, over sticky's"][0].startswith("1.5")
