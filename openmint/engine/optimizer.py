"""AdamW (arXiv:1711.05101) on one adapter's flat vector. P parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.kernels.adamw import Moments, Rates, update
from openmint.layers.shards import Shard
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


class SpareState:
    """The memory of a state that an update has replaced, for the next one of any run on a CPU."""

    def __init__(self) -> None:
        self._vectors: Moments | None = None

    def give(self, state: AdamState) -> None:
        """Nobody may read `state` any more."""
        if state.params_P.device.type == "cpu":
            self._vectors = state.params_P, state.exp_avg_P, state.exp_avg_sq_P

    def take(self, num_params: int) -> Moments | None:
        """Vectors to write to, if there are some of this length."""
        if self._vectors is None or len(self._vectors[0]) != num_params:
            return None
        vectors, self._vectors = self._vectors, None
        return vectors


def adamw(
    state: AdamState,
    grads_P: Tensor,
    adam: AdamParams,
    spare: SpareState,
    shard: Shard | None = None,
) -> tuple[AdamState, float]:
    """The state after one update, in `spare` memory, and the gradient's norm before clipping.

    `state` and `grads_P` are untouched, so that a refused update changes nothing. They may be one
    rank's `shard`: all ranks then update at once, and what one of them refuses all do.
    Raises InvalidRequest when the gradient overflows or the update leaves the finite numbers.
    """
    grad_norm = shard.norm(grads_P) if shard else float(grads_P.norm())
    if not grad_norm < 1e18:  # its square must fit fp32 too; also true of NaN
        raise InvalidRequest(f"the accumulated gradient has norm {grad_norm}; nothing was applied")
    clips = 0.0 < adam.grad_clip_norm < grad_norm
    step = state.num_optim_steps + 1
    step_size = adam.learning_rate / (1.0 - adam.beta1**step)
    rates = Rates(
        clip=adam.grad_clip_norm / grad_norm if clips else 1.0,
        one_minus_beta1=1.0 - adam.beta1,
        beta2=adam.beta2,
        one_minus_beta2=1.0 - adam.beta2,
        correction=(1.0 - adam.beta2**step) ** 0.5,
        eps=adam.eps,
        step=min(step_size, LARGEST_STEP),
        decay=1.0 - adam.learning_rate * adam.weight_decay,
    )
    moments = state.params_P, state.exp_avg_P, state.exp_avg_sq_P
    params_P, exp_avg_P, exp_avg_sq_P = update(moments, grads_P, rates, spare.take(len(grads_P)))
    is_sound = is_finite(params_P) and step_size <= LARGEST_STEP
    if not (shard.agree(is_sound) if shard else is_sound):
        raise InvalidRequest(
            f"optim_step with learning_rate {adam.learning_rate} and eps {adam.eps} would make "
            "weights infinite or NaN; nothing was applied"
        )
    return AdamState(params_P, exp_avg_P, exp_avg_sq_P, step), grad_norm


def is_finite(vector_P: Tensor) -> bool:
    """Whether it holds neither NaN nor infinities; 30 times as fast as to ask of each value."""
    least, most = torch.aminmax(vector_P)  # a NaN anywhere becomes both
    return math.isfinite(float(least)) and math.isfinite(float(most))
