"""The log of decisions: what is written is read, whole lines only, and files stay bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from openmint.errors import InvalidRequest
from openmint.residency import decisions as module
from openmint.residency.decisions import (
    Decision,
    DecisionLog,
    Recalled,
    older,
    path_of,
    read_decisions,
    recall,
    redo,
    times_of,
    uses_of,
)
from openmint.residency.replay import Use
from openmint.types import Digest

A, B, C = (Digest("sha256:" + letter * 64) for letter in "abc")


def written(path: Path, decisions: list[Decision], **settings: int) -> None:
    log = DecisionLog(path, 20, **settings)
    for decision in decisions:
        log.note(decision)
        log.flush()


def life(revision: Digest, num_bytes: int, seconds: float) -> list[Decision]:
    """Of a revision that is wanted once and not there."""
    return [
        Decision("want", revision),
        Decision("load", revision, num_bytes, seconds),
        Decision("admit", revision, num_bytes),
        Decision("release", revision),
    ]


def test_what_is_written_is_read_and_a_second_worker_goes_on(tmp_path: Path) -> None:
    path = path_of(tmp_path, A)
    written(path, life(A, 10, 0.5))
    written(path, life(B, 5, 0.25))
    start = Decision("start", num_bytes=20)
    assert list(read_decisions(path)) == [start, *life(A, 10, 0.5), start, *life(B, 5, 0.25)]
    assert uses_of(read_decisions(path)) == [Use(A, 10), Use(B, 5)]
    assert times_of(read_decisions(path)).seconds(10) == pytest.approx(0.5)


def test_a_line_that_a_crash_cut_off_is_left_out_and_any_other_is_refused(tmp_path: Path) -> None:
    path = path_of(tmp_path, A)
    written(path, life(A, 10, 0.5))
    whole = path.read_text()
    path.write_text(whole + '["want", "sha')
    assert len(list(read_decisions(path))) == 5
    path.write_text(whole + "nonsense\n" + whole)
    with pytest.raises(InvalidRequest, match=r"line 6, is no decision: 'nonsense'"):
        list(read_decisions(path))


def test_no_more_than_two_files_of_bounded_length_are_kept(tmp_path: Path) -> None:
    path = path_of(tmp_path, A)
    written(path, life(A, 10, 0.5) * 100, most_bytes=2000)
    assert sorted(each.name for each in path.parent.iterdir()) == [older(path).name, path.name]
    assert older(path).stat().st_size + path.stat().st_size < 2 * 2200
    kept = list(read_decisions(path))
    assert kept == ([*life(A, 10, 0.5)] * 100)[-len(kept) :]


def test_doing_it_over_shows_a_decision_that_was_another(tmp_path: Path) -> None:
    start = Decision("start", num_bytes=20)
    lives = [*life(A, 10, 1.0), *life(B, 10, 1.0)]
    third = life(C, 10, 1.0)
    right = [start, *lives, *third[:2], Decision("evict", A), *third[2:]]
    wrong = [start, *lives, *third[:2], Decision("evict", B), *third[2:]]
    assert list(redo(right))[-1] == ([A], [A])
    assert list(redo(wrong))[-1] == ([B], [A])
    assert list(redo(lives)) == []  # how large the memory was is not known


def test_a_line_that_a_crash_cut_off_does_not_spoil_the_next_worker_s_first(tmp_path: Path) -> None:
    path = path_of(tmp_path, A)
    written(path, life(A, 10, 0.5))
    path.write_text(path.read_text() + '["want", "sha')
    written(path, life(B, 10, 0.5))
    assert len(list(read_decisions(path))) == 10


def test_what_was_asked_for_is_recalled_in_order_with_its_size(tmp_path: Path) -> None:
    path = path_of(tmp_path, A)
    assert recall(path) == Recalled()
    written(path, [*life(A, 10, 0.5), Decision("refuse", C), *life(B, 5, 0.25)])
    written(path, [Decision("want", A), Decision("want", B, 5)])
    assert recall(path) == Recalled((A, C, B, A, B), {A: 10, B: 5})


def test_the_end_of_both_files_is_recalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_of(tmp_path, A)
    written(path, [*life(A, 10, 0.5) * 20, *life(B, 5, 0.25) * 3], most_bytes=7500)
    assert older(path).is_file()
    assert recall(path).uses == (*[A] * 20, *[B] * 3)
    monkeypatch.setattr(module, "MOST_RECALLED", 5)
    assert recall(path) == Recalled((A, A, B, B, B), {A: 10, B: 5})
    for num_bytes in range(0, 3000, 7):
        monkeypatch.setattr(module, "RECALLED_BYTES", num_bytes)
        uses = recall(path).uses
        assert uses == (A, A, B, B, B)[5 - len(uses) :]


@pytest.mark.parametrize("damage", [b"nonsense", b"5", b'["want"]', b"\xff\xfe", b"\0" * 300])
def test_what_is_damaged_hides_what_was_before_it(tmp_path: Path, damage: bytes) -> None:
    path = path_of(tmp_path, A)
    written(path, life(A, 10, 0.5))
    path.write_bytes(path.read_bytes() + damage + b"\n")
    assert recall(path) == Recalled()
    written(path, life(B, 5, 0.25))
    path.write_bytes(path.read_bytes() + b'["want", "sh')
    assert recall(path) == Recalled((B,), {B: 5})


def test_doing_it_over_learns_what_the_worker_learned_or_leaves_it_out() -> None:
    start = Decision("start", num_bytes=20)
    before = [Decision("want", A)] * 5
    new = [Decision("recall", num_bytes=5), *life(A, 10, 1.0), *life(B, 10, 1.0)]
    third = [*life(C, 10, 1.0)[:2], Decision("evict", B), *life(C, 10, 1.0)[2:]]
    # A, which was used often before, stays.
    assert list(redo([start, *before, start, *new, *third]))[-1] == ([B], [B])
    assert list(redo([start, *before[1:], start, *new, *third])) == []
