"""AdamW (arXiv:1711.05101) on one adapter's flat vector. P parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.types import AdamParams

LARGEST_STEP = 1e30
"""Beyond it an update can only overflow fp32."""


@dataclass(frozen=True, slots=True)
class AdamState:
    """fp32 weights and moments after `num_optim_steps` updates; replaced whole by each update."""

    params_P: Tensor
    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    num_optim_steps: int

    @staticmethod
    def fresh(params_P: Tensor) -> AdamState:
        zeros = torch.zeros_like(params_P)
        return AdamState(params_P, zeros, zeros.clone(), 0)


def adamw(state: AdamState, grads_P: Tensor, adam: AdamParams) -> tuple[AdamState, float]:
    """The state after one update, and the gradient's norm before clipping.

    Pure: `state` and `grads_P` are untouched, so that a refused update changes nothing.
    Raises InvalidRequest when the gradient overflows or the update leaves the finite numbers.
    """
    grad_norm = float(grads_P.norm())
    if not grad_norm < 1e18:  # its square must fit fp32 too; also true of NaN
        raise InvalidRequest(f"the accumulated gradient has norm {grad_norm}; nothing was applied")
    if 0.0 < adam.grad_clip_norm < grad_norm:
        grads_P = grads_P * (adam.grad_clip_norm / grad_norm)
    step = state.num_optim_steps + 1
    exp_avg_P = torch.lerp(state.exp_avg_P, grads_P, 1.0 - adam.beta1)
    exp_avg_sq_P = torch.addcmul(
        state.exp_avg_sq_P * adam.beta2, grads_P, grads_P, value=1.0 - adam.beta2
    )
    denominator_P = exp_avg_sq_P.sqrt() / (1.0 - adam.beta2**step) ** 0.5 + adam.eps
    step_size = adam.learning_rate / (1.0 - adam.beta1**step)
    decayed_P = state.params_P * (1.0 - adam.learning_rate * adam.weight_decay)
    params_P = decayed_P.addcdiv_(exp_avg_P, denominator_P, value=-min(step_size, LARGEST_STEP))
    if not bool(torch.isfinite(params_P).all()) or step_size > LARGEST_STEP:
        raise InvalidRequest(
            f"optim_step with learning_rate {adam.learning_rate} and eps {adam.eps} would make "
            "weights infinite or NaN; nothing was applied"
        )
    return AdamState(params_P, exp_avg_P, exp_avg_sq_P, step), grad_norm
