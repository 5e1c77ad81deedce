"""Two ranks train and sample what one does: layers, experts and latents divided."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from openmint.errors import InvalidRequest
from openmint.layers.ranks import Division, Ranks
from tests.engine.rank_jobs import (
    Outcome,
    all_sessions,
    overflow,
    replay,
    replays,
    session,
    sessions,
    unequal,
)
from tests.ranks import on_ranks
from tests.workbench import Workbench, random_model

DIVIDED: dict[str, tuple[str, ...]] = {
    "qwen3": ("tensor", "data"),
    "qwen3-moe": ("tensor", "experts", "both", "data"),
    "gpt-oss": ("tensor", "experts", "data"),
    "deepseek-v3": ("tensor", "experts", "both", "data"),
    "deepseek-v3.2": ("both",),
    "glm-5": ("both", "data"),
    "glm4-moe-lite": ("both",),
    "glm4-moe": ("both",),
    "mixtral": ("both",),
    "minimax-m2": ("experts",),
    "olmoe": ("experts", "data"),
}
Sessions = tuple[Outcome, list[dict[str, Outcome]]]
Divided = tuple[Path, list[dict[Path, dict[str, Outcome]]]]


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Divided:
    """Every family in each of its forms by each of two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    forms_of = {random_model(name, root / name): forms for name, forms in DIVIDED.items()}
    return root, on_ranks(all_sessions, root, forms_of, root / "stores", seconds=600.0)


@pytest.fixture(scope="module", params=DIVIDED)
def both(request: pytest.FixtureRequest, divided: Divided) -> Sessions:
    """One family by one rank, and in every form by each of two."""
    root, ranks = divided
    folder = root / request.param
    return session(folder, root / f"{request.param}-alone"), [rank[folder] for rank in ranks]


def pairs(both: Sessions) -> Iterator[tuple[Outcome, Outcome]]:
    """What each rank found in each form, and what is expected."""
    alone, ranks = both
    for rank in ranks:
        yield from ((outcome, alone) for outcome in rank.values())


def test_losses_and_gradients_equal_one_ranks(both: Sessions) -> None:
    for outcome, alone in pairs(both):
        for ours, theirs in zip(outcome.results, alone.results, strict=True):
            assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-5)
            for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
        for a, b in zip(outcome.gradients, alone.gradients, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-5
        assert outcome.grad_norms == pytest.approx(alone.grad_norms, rel=1e-4)


def test_updates_and_samples_equal_one_ranks(both: Sessions) -> None:
    for outcome, alone in pairs(both):
        for a, b in zip(outcome.updated, alone.updated, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-4
        assert outcome.tokens == alone.tokens
        for a, b in zip(outcome.logprobs, alone.logprobs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_ranks_export_the_same_files_to_the_bit(both: Sessions) -> None:
    first, second = both[1]
    for form, outcome in first.items():
        assert outcome.digests == second[form].digests


def test_each_rank_has_its_part_of_the_weights_alone(both: Sessions) -> None:
    for outcome, alone in pairs(both):
        assert alone.own_weights / 2 <= outcome.own_weights < 0.8 * alone.own_weights


def test_weights_whose_rows_do_not_divide_are_held_in_parts_too(tmp_path: Path) -> None:
    folder = random_model("qwen3", tmp_path / "base")
    alone = session(folder, tmp_path / "alone")
    for rank in on_ranks(sessions, tmp_path, folder, ("data",), tmp_path, size=3):
        assert rank["data"].tokens == alone.tokens
        for a, b in zip(rank["data"].gradients, alone.gradients, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-5


def test_ranks_in_bfloat16_agree_among_themselves_and_nearly_with_one(tmp_path: Path) -> None:
    """In tiles, where the machine has them."""
    folder, forms = random_model("qwen3", tmp_path / "base"), ("tensor", "data")
    alone = session(folder, tmp_path / "alone", dtype="bfloat16")
    first, second = on_ranks(sessions, tmp_path, folder, forms, tmp_path, "bfloat16")
    for form, outcome in first.items():
        assert outcome.digests == second[form].digests
        for ours, theirs in zip(outcome.results, alone.results, strict=True):
            assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], rel=0.02)
        for a, b in zip(outcome.gradients, alone.gradients, strict=True):
            assert float((a - b).norm() / b.norm()) < 0.1


def test_what_sampling_chose_is_repeated_on_all_ranks(tmp_path: Path) -> None:
    folder = random_model("deepseek-v3.2", tmp_path / "base")
    record, metrics, gradient = replay(folder, tmp_path / "alone")
    assert 0.0 < metrics["out_of_route_ratio:mean"] < metrics["own_route_differs_ratio:mean"]
    for rank in on_ranks(replays, tmp_path, folder, ("both", "data"), tmp_path):
        for ours in rank.values():
            assert ours[0] == record
            assert ours[1] == pytest.approx(metrics, rel=1e-5)
            # Ratios to the sampler are powers of differences of log-probabilities.
            assert float((ours[2] - gradient).norm() / gradient.norm()) < 1e-4


def test_an_export_finds_copies_that_differ_and_names_them(tmp_path: Path) -> None:
    folder = random_model("qwen3", tmp_path / "base")
    said = on_ranks(unequal, tmp_path, folder, tmp_path)
    expected = "A of target model.layers.1.self_attn.k_proj differs between rank 0 and rank 1"
    assert all(expected in message for message in said)


def test_a_gradient_that_is_not_finite_on_one_rank_is_dropped_on_all(tmp_path: Path) -> None:
    folder = random_model("qwen3", tmp_path / "base")
    assert on_ranks(overflow, tmp_path, folder, tmp_path) == [("NonFinite", 0.0)] * 2


@pytest.mark.parametrize(
    ("family", "form", "message"),
    [
        ("qwen3", "tensor", "2 heads of keys and values can't be divided among 4 ranks"),
        ("qwen3", "experts", "no experts"),
        ("olmoe", "tensor", "q_norm spans all heads"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    tmp_path: Path, family: str, form: str, message: str
) -> None:
    folder = random_model(family, tmp_path / "base")
    parts = Division(**{form: Ranks(0, 4)})
    with pytest.raises(InvalidRequest, match=message):
        Workbench(folder, tmp_path, division=parts)
