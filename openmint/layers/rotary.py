"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Hugging Face weights.

Shapes: T tokens, H heads, D head size, N positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openmint.errors import InvalidRequest

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
        """`(cos_T1D, sin_T1D)` for a batch; shared by all its layers and heads."""
        cos, sin = self.cos_ND[positions_T], self.sin_ND[positions_T]
        return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Each head of each token turned by its position's angles."""
    left, right = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat((-right, left), dim=-1) * sin_T1D
