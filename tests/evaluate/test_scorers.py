from decimal import Decimal

import pytest

from openmint.evaluate.scorers import is_right, last_choice, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42.", "42"),
        ("3 + 4 = 7", "7"),
        ("10-3", "3"),
        ("it is -7", "-7"),
        ("\u2212\u200a", None),
        ("\u22125", "-5"),
        ("$1,234.50!", "1234.50"),
        ("1,2,3", "3"),
        ("0.5", "0.5"),
        ("about .25", "0.25"),
        ("version v2.5", None),
        ("**12** apples", "12"),
        ("42km", "42"),
        ("nothing", None),
        ("9" * 65, None),
    ],
)
def test_last_number_reads_what_a_person_would(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_number_compares_values_not_spelling() -> None:
    assert is_right("number", "So we get 1,200", "1200.0", ())
    assert not is_right("number", "1200 then 3", "1200", ())
    assert not is_right("number", "no idea", "0", ())


def test_exact_ignores_only_surrounding_white_space() -> None:
    assert is_right("exact", " positive\n", "positive", ())
    assert not is_right("exact", "Positive", "positive", ())


def test_contains_ignores_case() -> None:
    assert is_right("contains", "The capital is PARIS.", "Paris", ())
    assert not is_right("contains", "London", "Paris", ())


def test_choice_takes_the_last_that_stands_alone() -> None:
    assert last_choice("A? No, (B).", ("A", "B")) == "B"
    assert last_choice("ABBA", ("A", "B")) is None
    assert last_choice("very positive", ("positive", "very positive")) == "very positive"
    assert is_right("choice", "Answer: C", "C", ("A", "B", "C"))


def test_regex_searches_in_the_completion() -> None:
    assert is_right("regex", "<answer>12</answer>", r"<answer>\d+</answer>", ())
    assert not is_right("regex", "12", r"<answer>\d+</answer>", ())
