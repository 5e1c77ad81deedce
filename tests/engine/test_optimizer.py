"""AdamW against torch's own."""

from __future__ import annotations

import pytest
import torch

from openmint.engine.optimizer import AdamState, SpareState, adamw, is_finite
from openmint.errors import InvalidRequest
from openmint.types import AdamParams

CASES = [
    AdamParams(learning_rate=1e-2),
    AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.999, eps=1e-8, weight_decay=0.1),
    AdamParams(learning_rate=1e-3, grad_clip_norm=0.5),
]


@pytest.mark.parametrize("adam", CASES)
def test_twenty_updates_equal_torch(adam: AdamParams) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=generator)
    state, theirs = AdamState.fresh(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW(
        [theirs],
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    for _ in range(20):
        grads = torch.randn(200, generator=generator)
        theirs.grad = grads.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], adam.grad_clip_norm or 1e9)
        optimizer.step()
        state, reported = adamw(state, grads, adam, SpareState())
        assert reported == pytest.approx(float(norm))
    torch.testing.assert_close(state.params_P, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert state.num_optim_steps == 20


@pytest.mark.parametrize(
    ("adam", "grads"),
    [
        (AdamParams(learning_rate=1e38), torch.ones(3)),
        (AdamParams(eps=0.0), torch.zeros(3)),
        (AdamParams(), torch.tensor([1.0, float("nan"), 0.0])),
        (AdamParams(), torch.full((3,), 1e30)),
    ],
)
def test_an_update_that_leaves_the_finite_numbers_changes_nothing(
    adam: AdamParams, grads: torch.Tensor
) -> None:
    state = AdamState.fresh(torch.full((3,), 1e5))
    before = (state.params_P.clone(), state.exp_avg_P.clone(), state.exp_avg_sq_P.clone())
    with pytest.raises(InvalidRequest, match="nothing was applied"):
        adamw(state, grads, adam, SpareState())
    after = (state.params_P, state.exp_avg_P, state.exp_avg_sq_P)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_params", [1, 7, 10_000])
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(
    value: float, num_params: int
) -> None:
    for at in {0, num_params // 2, num_params - 1}:
        vector_P = torch.ones(num_params)
        assert is_finite(vector_P)
        vector_P[at] = value
        assert not is_finite(vector_P)
