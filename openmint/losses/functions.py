"""The losses by name. Each maps target log-probabilities to a loss per token; sums come later."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from openmint.losses.cispo import cispo
from openmint.losses.cross_entropy import cross_entropy
from openmint.losses.dro import dro
from openmint.losses.importance_sampling import importance_sampling
from openmint.losses.ppo import ppo

LossFunction = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, float]], Tensor]

LOSS_FUNCTIONS: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
}
"""Their inputs, settings and defaults stand in `losses/spec.py`, which needs no torch."""
