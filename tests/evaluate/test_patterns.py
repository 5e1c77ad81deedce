import time

import pytest

from openmint.errors import InvalidRequest
from openmint.evaluate.patterns import check_pattern, matches


@pytest.mark.parametrize(
    "pattern",
    [
        "abc",
        r"\d{1,3}(?:,\d{3})",
        r"[^a-z\]]+$",
        "(yes|no)?",
        "a{2,}b",
        r"\{x\}",
        "[]a]",
        r"\(.*?\)",
    ],
)
def test_ordinary_patterns_are_allowed(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("(a+)+$", "repeat inside"),
        ("((a*)b)*", "repeat inside"),
        ("(?:(?:a{500}){500}){500}", "repeat inside"),
        ("a{1001}", "count"),
        (r"(a)\1", "escape"),
        ("(?=a)", "groups"),
        ("(?P<x>a)", "groups"),
        ("(?i)a", "groups"),
        ("(a){e<=1}", "count such as"),
        ("a**", "two repeats"),
        ("*a", "nothing to repeat"),
        ("(a", "not valid"),
        ("a)", "unmatched"),
        ("[a", "not closed"),
        ("[[a]--[b]]", "inside a character class"),
        ("a\\", "escape"),
        ("", "256"),
        ("a" * 257, "256"),
    ],
)
def test_patterns_that_could_eat_the_server_are_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        check_pattern(pattern)


def test_a_slow_match_ends_in_time_and_counts_as_none() -> None:
    pattern = "a*a*a*a*a*a*a*a*b"
    check_pattern(pattern)
    started_at = time.monotonic()
    assert not matches(pattern, "a" * 20_000)
    assert time.monotonic() - started_at < 2
