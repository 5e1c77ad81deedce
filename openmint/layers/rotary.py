"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Hugging Face weights.

Shapes: T tokens, W values of all heads, D head size, N positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openmint.errors import InvalidRequest
from openmint.kernels import rotary
from openmint.kernels.choice import use_triton

SUPPORTED = ("default", "linear", "llama3", "yarn")


class Rotary:
    """Cosines and sines of every position of the context, made once in fp32."""

    def __init__(self, config: PretrainedConfig, head_dim: int, device: str) -> None:
        parameters = dict(config.rope_parameters or {})
        kind = parameters.get("rope_type", "default")
        if kind not in SUPPORTED:
            known = ", ".join(SUPPORTED)
            raise InvalidRequest(f"rope_type {kind!r} is not supported; supported: {known}")
        if kind == "default":
            exponent_D = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inverse_D, scale = 1.0 / parameters["rope_theta"] ** exponent_D, 1.0
        else:
            inverse_D, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        positions_N = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angle_ND = torch.outer(positions_N, inverse_D).repeat(1, 2)
        self.cos_ND = (angle_ND.cos() * scale).to(device)
        self.sin_ND = (angle_ND.sin() * scale).to(device)

    def at(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(cos_TD, sin_TD)` for a batch; shared by all its layers and heads."""
        return self.cos_ND[positions_T].to(dtype), self.sin_ND[positions_T].to(dtype)


def rotate(
    heads_TW: Tensor, cos_TD: Tensor, sin_TD: Tensor, num_rotated: int
) -> tuple[Tensor, Tensor]:
    """The first heads of each row turned by its position's angles, and the other heads as they are:
    `([T, num_rotated, D], [T, rest, D])`."""
    width = cos_TD.shape[1]
    if use_triton(heads_TW.device) and not heads_TW.requires_grad:
        from openmint.kernels import fused_decode

        turned = fused_decode.rotate(heads_TW, cos_TD, sin_TD, num_rotated)
        return turned, heads_TW.unflatten(1, (-1, width))[:, num_rotated:]
    if heads_TW.device.type != "cpu":
        turned = rotary.reference(heads_TW, cos_TD, sin_TD, num_rotated)
        return turned, heads_TW.unflatten(1, (-1, width))[:, num_rotated:]
    run = rotary.FusedRotary.apply if heads_TW.requires_grad else rotary.forward
    turned, rest = run(heads_TW, cos_TD, sin_TD, num_rotated)
    return turned.unflatten(1, (num_rotated, width)), rest.unflatten(1, (-1, width))
