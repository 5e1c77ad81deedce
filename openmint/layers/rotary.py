"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Hugging Face weights.

Shapes: T tokens, W values of all heads, H heads, D the part of a head that turns, N positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openmint.errors import InvalidRequest
from openmint.kernels import rotary
from openmint.kernels.choice import use_triton

SUPPORTED = ("default", "linear", "llama3", "yarn")


class Angles(NamedTuple):
    """Of a batch; shared by all layers and heads."""

    cos_TD: Tensor
    sin_TD: Tensor


class Rotary:
    """Cosines and sines of every position of the context, made once in fp32."""

    def __init__(self, config: PretrainedConfig, width: int, device: str) -> None:
        """`width` is the part of a head that turns."""
        parameters = dict(config.rope_parameters or {})
        kind = parameters.get("rope_type", "default")
        if kind not in SUPPORTED:
            known = ", ".join(SUPPORTED)
            raise InvalidRequest(f"rope_type {kind!r} is not supported; supported: {known}")
        if kind == "default":
            exponent_D = torch.arange(0, width, 2, dtype=torch.float32) / width
            inverse_D, scale = 1.0 / parameters["rope_theta"] ** exponent_D, 1.0
        else:
            inverse_D, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        positions_N = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angle_ND = torch.outer(positions_N, inverse_D).repeat(1, 2)
        self.cos_ND = (angle_ND.cos() * scale).to(device)
        self.sin_ND = (angle_ND.sin() * scale).to(device)

    def at(self, positions_T: Tensor, dtype: torch.dtype) -> Angles:
        return Angles(self.cos_ND[positions_T].to(dtype), self.sin_ND[positions_T].to(dtype))


def rotate(heads_TW: Tensor, angles: Angles, num_rotated: int, width: int) -> tuple[Tensor, Tensor]:
    """The first heads of each row turned by its position's angles, and the other heads as they are:
    `([T, num_rotated, width], [T, rest, width])`."""
    cos_TD, sin_TD = angles
    if cos_TD.shape[1] < width:
        heads_THD = heads_TW.unflatten(1, (-1, width))
        turned = _rotate_part(heads_THD[:, :num_rotated], angles)
        return turned, heads_THD[:, num_rotated:]
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


def _rotate_part(x_THW: Tensor, angles: Angles) -> Tensor:
    """Heads of which the first values turn, as many as there are angles."""
    width = angles.cos_TD.shape[1]
    turned = rotary.reference(x_THW[..., :width].flatten(1), *angles, x_THW.shape[1])
    return torch.cat((turned, x_THW[..., width:]), dim=-1)


def rotate_halves(x_THD: Tensor, angles: Angles) -> Tensor:
    """Heads of which the first half turns with the second."""
    return rotary.reference(x_THD.flatten(1), *angles, x_THD.shape[1])


def rotate_pairs(x_THD: Tensor, angles: Angles) -> Tensor:
    """Heads whose neighbours turn together, as DeepSeek's do; the first of all pairs come out
    before the second."""
    half = x_THD.shape[-1] // 2
    cos_T1P, sin_T1P = (each[:, None, :half] for each in angles)
    left, right = x_THD[..., 0::2], x_THD[..., 1::2]
    return torch.cat((left * cos_T1P - right * sin_T1P, right * cos_T1P + left * sin_T1P), dim=-1)
