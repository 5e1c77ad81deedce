"""Each loss by the formula of the protocol, value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from openmint.errors import InvalidRequest
from openmint.losses.functions import LOSS_FUNCTIONS
from openmint.losses.spec import LOSSES, REFUSED, loss_def

Numbers = dict[str, float]


def clip(value: float, config: Numbers) -> float:
    return min(max(value, config["clip_low_threshold"]), config["clip_high_threshold"])


def ppo(lp: float, x: Numbers, c: Numbers) -> float:
    r = math.exp(lp - x["logprobs"])
    return -min(r * x["advantages"], clip(r, c) * x["advantages"])


def dro(lp: float, x: Numbers, c: Numbers) -> float:
    return -(lp * x["advantages"] - 0.5 * c["beta"] * (lp - x["logprobs"]) ** 2)


FORMULAS: dict[str, Callable[[float, Numbers, Numbers], float]] = {
    "cross_entropy": lambda lp, x, c: -lp * x["weights"],
    "importance_sampling": lambda lp, x, c: -math.exp(lp - x["logprobs"]) * x["advantages"],
    "ppo": ppo,
    "cispo": lambda lp, x, c: -clip(math.exp(lp - x["logprobs"]), c) * lp * x["advantages"],
    "dro": dro,
}
CONFIGS: list[tuple[str, Numbers]] = [
    *((name, dict(LOSSES[name].config)) for name in FORMULAS),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}),
    ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("dro", {"beta": 2.0}),
]


def example(size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and inputs with zeros among them, on both sides of every clip."""
    numbers = np.random.default_rng(0)
    lp = torch.from_numpy(-np.abs(numbers.normal(2.0, 1.0, size)))
    inputs = {
        "weights": torch.from_numpy(numbers.normal(size=size) * (numbers.random(size) > 0.2)),
        "advantages": torch.from_numpy(numbers.normal(size=size) * (numbers.random(size) > 0.2)),
        "logprobs": lp + torch.from_numpy(numbers.normal(0.0, 0.7, size)),
    }
    return lp, inputs


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_value_and_slope_follow_the_formula(name: str, config: Numbers) -> None:
    lp, inputs = example(400)
    lp.requires_grad_()
    loss = LOSS_FUNCTIONS[name](lp, inputs, config)
    loss.sum().backward()
    assert lp.grad is not None
    ratios = torch.exp(lp.detach() - inputs["logprobs"])
    if name in ("ppo", "cispo"):
        assert ratios.max() > config["clip_high_threshold"]
    step = 1e-6
    for i in range(400):
        x = {key: float(value[i]) for key, value in inputs.items()}
        at = float(lp.detach()[i])
        assert float(loss.detach()[i]) == pytest.approx(FORMULAS[name](at, x, config), rel=1e-12)
        if name == "cispo":
            # The clipped ratio is held constant: the slope is its own.
            expected = -clip(float(ratios[i]), config) * x["advantages"]
        else:
            up, down = (FORMULAS[name](at + s, x, config) for s in (step, -step))
            expected = (up - down) / (2 * step)
        assert float(lp.grad[i]) == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", FORMULAS)
def test_where_nothing_is_at_stake_nothing_is_learned(name: str) -> None:
    lp, inputs = example(50)
    lp.requires_grad_()
    inputs = {**inputs, "weights": torch.zeros(50), "advantages": torch.zeros(50)}
    config = {**LOSSES[name].config, "beta": 0.0}
    LOSS_FUNCTIONS[name](lp, inputs, config).sum().backward()
    assert lp.grad is not None
    assert not lp.grad.any()


def test_a_ratio_outside_ppos_bounds_on_the_good_side_has_no_slope() -> None:
    lp = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    inputs = {
        "logprobs": torch.tensor([-1.0, -1.0, 1.0, 1.0]),
        "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0]),
    }
    LOSS_FUNCTIONS["ppo"](lp, inputs, LOSSES["ppo"].config).sum().backward()
    assert lp.grad is not None
    assert [bool(slope) for slope in lp.grad] == [False, True, True, False]


def test_weighted_candidates_keep_their_shape() -> None:
    lp = torch.full((3, 4), -2.0)
    weights = torch.arange(12.0).view(3, 4)
    loss = LOSS_FUNCTIONS["cross_entropy"](lp, {"weights": weights}, {})
    torch.testing.assert_close(loss, 2.0 * weights)


def test_every_loss_has_a_contract_and_the_documented_defaults() -> None:
    assert LOSSES.keys() == LOSS_FUNCTIONS.keys()
    assert LOSSES["ppo"].config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert LOSSES["cispo"].config == {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    assert LOSSES["cross_entropy"].inputs == ("target_tokens", "weights")
    assert [name for name, loss in LOSSES.items() if loss.multi_target] == ["cross_entropy"]


@pytest.mark.parametrize("name", [*REFUSED, "mse", "", "PPO"])
def test_other_losses_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(InvalidRequest, match="available: cispo, cross_entropy, dro, importance_"):
        loss_def(name)
