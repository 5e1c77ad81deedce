"""The demo's parts that need no service: its data, rewards, arithmetic of the report."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from examples.demo import arithmetic, languages
from examples.demo.catalogue import Score
from examples.demo.progress import Board, Curve, sparkline
from examples.demo.report import ClaimFailed, Report, draw_curves, running_mean
from openmint.evaluate.run import MAX_ASKED_AT_ONCE
from openmint.evaluate.task import parse_task


def test_held_out_sums_are_never_trained_on_and_the_split_repeats():
    training, held_out = arithmetic.split_sums(150, seed=7)
    assert len(held_out) == 150
    assert len(training) == 400 - 150
    assert not set(training) & set(held_out)
    assert (training, held_out) == arithmetic.split_sums(150, seed=7)


def test_a_sum_is_right_only_as_the_bare_number():
    assert arithmetic.is_right(" 17\n", 17)
    assert not arithmetic.is_right(" 17 + 1", 17)
    assert not arithmetic.is_right(" 117", 17)
    assert not arithmetic.is_right("", 17)


def test_a_sampled_answer_pushes_only_on_its_own_tokens():
    answer = SimpleNamespace(tokens=[8, 9], logprobs=[-0.5, -0.25])
    datum = arithmetic._datum([5, 6, 7], answer, advantage=0.75)
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    inputs = {name: list(tensor.data) for name, tensor in datum.loss_fn_inputs.items()}
    assert inputs["target_tokens"] == [6, 7, 8, 9]
    assert inputs["logprobs"] == [0, 0, -0.5, -0.25]
    assert inputs["advantages"] == [0, 0, 0.75, 0.75]


def test_an_example_of_sft_weighs_the_answer_alone():
    datum = languages._datum([5, 6, 7], [8, 9])
    assert list(datum.loss_fn_inputs["target_tokens"].data) == [6, 7, 8, 9]
    assert list(datum.loss_fn_inputs["weights"].data) == [0, 0, 1, 1]


def test_each_phrase_belongs_to_one_language():
    phrases = languages.read_phrases()
    texts = [phrase.text.casefold() for phrase in phrases]
    assert len(texts) == len(set(texts)) > 5000
    assert {phrase.language for phrase in phrases} == set(languages.LANGUAGES.values())
    assert languages.Phrase("territories/DE", "Deutschland", "German") in phrases


def test_held_out_phrases_share_no_entry_with_the_training_ones():
    training, held_out = languages.split_phrases(languages.read_phrases(), 150, seed=7)
    assert len(held_out) == 150
    assert not {p.entry for p in training} & {p.entry for p in held_out}
    assert (training, held_out) == languages.split_phrases(languages.read_phrases(), 150, seed=7)


def test_every_training_step_has_a_whole_batch_of_fresh_phrases():
    from examples.demo.__main__ import FULL, QUICK

    for scale in (FULL, QUICK):
        training, _ = languages.split_phrases(languages.read_phrases(), scale.num_held_out, 7)
        assert scale.sft.num_steps * scale.sft.batch_size <= len(training)
        assert scale.num_held_out >= 100 >= MAX_ASKED_AT_ONCE


def test_the_service_takes_both_evaluation_tasks():
    _, sums = arithmetic.split_sums(100, seed=7)
    _, phrases = languages.split_phrases(languages.read_phrases(), 100, seed=7)
    assert len(parse_task(arithmetic.evaluation_task(sums)).items) == 100
    assert len(parse_task(languages.evaluation_task(phrases)).items) == 100


def test_a_claim_that_does_not_hold_ends_the_demo():
    report = Report(Console(file=io.StringIO()))
    report.claim(True, "fine")
    assert report.num_claims == 1
    with pytest.raises(ClaimFailed, match="two is three"):
        report.claim(2 == 3, "two is three")


def test_the_exit_code_says_whether_all_claims_held(monkeypatch, capsys, tmp_path):
    from examples.demo import __main__ as demo

    def run(scale: object, output: object, console: Console) -> None:
        if scale is demo.FULL:
            raise ClaimFailed("the score didn't rise")

    monkeypatch.setattr(demo, "run", run)
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 0
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "not so: the score didn't rise" in capsys.readouterr().out


def test_progress_without_a_terminal_is_lines_and_a_table():
    out = io.StringIO()
    curve = Curve("acme/arithmetic", "GRPO", "reward", num_steps=6)
    with Board(Console(file=out, width=100), [curve]) as board:
        for step in range(6):
            board.add(curve, step / 10, num_trained=100, num_sampled=10)
    assert curve.num_trained_tokens == 600
    assert [line.split()[3] for line in out.getvalue().splitlines()[:2]] == ["5/6", "6/6"]
    assert "reward 0.50" in out.getvalue()


def test_sparkline_spans_the_lowest_and_highest_bar():
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


def test_running_mean_looks_back_five_steps():
    assert running_mean([1.0, 3.0, 5.0]) == [1.0, 2.0, 3.0]
    assert running_mean([0.0] * 5 + [5.0])[-1] == 1.0


def test_learning_curves_become_a_png(tmp_path):
    score = Score(None, 20.0, 100, 15.0, 25.0)
    curves = [
        Curve("a/x", "GRPO", "reward", 3, values=[0.1, 0.5, 0.9]),
        Curve("b/y", "SFT", "loss", 3, values=[3.0, 2.0, 1.0]),
    ]
    path = tmp_path / "curves.png"
    draw_curves(curves, [("a/x", score, score, 15.0), ("b/y", score, score, 30.0)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
