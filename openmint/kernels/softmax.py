"""Softmax of attention scores in place, where each query sees the keys of a range.

S sequences, G key heads, Q query rows, K keys, L tokens. A row's query is token `row % L` of its
sequence, as query heads that share a key head stand one after another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmint.kernels.jit import F32, as_array, exp, kernel, largest, load, rounded
from openmint.types import IntArray


def reference(scores_SGQK: Tensor, at_SL: Tensor, window: int, scale: float) -> Tensor:
    """Probabilities of the keys `at - window < k <= at`; the query's position is `at`."""
    num_keys, num_rows = scores_SGQK.shape[3], scores_SGQK.shape[2]
    keys_K = torch.arange(num_keys, device=at_SL.device)
    distance_SLK = at_SL[:, :, None] - keys_K
    sees_SLK = (distance_SLK >= 0) & (distance_SLK < window)
    sees_SQK = sees_SLK.repeat(1, num_rows // at_SL.shape[1], 1)
    scores = (scores_SGQK.float() * scale).masked_fill(~sees_SQK[:, None], float("-inf"))
    return scores.softmax(-1).to(scores_SGQK.dtype)


@kernel
def _forward(scores_SGQK: Any, at_SL: Any, window: Any, scale: Any) -> None:
    num_seqs, num_heads, num_rows, num_keys = scores_SGQK.shape
    powers_K = np.empty(num_keys, np.float32)
    for s in range(num_seqs):
        for g in range(num_heads):
            for q in range(num_rows):
                row_K, at = scores_SGQK[s, g, q], at_SL[s, q % at_SL.shape[1]]
                first, stop = max(0, at - window + 1), min(at + 1, num_keys)
                seen_N = row_K[first:stop]
                top, total = largest(seen_N), F32(0.0)
                for n in range(len(seen_N)):
                    powers_K[n] = exp((load(seen_N[n]) - top) * scale)
                for n in range(len(seen_N)):
                    total += powers_K[n]
                share = F32(1.0) / total
                row_K[:first] = 0
                row_K[stop:] = 0
                for n in range(len(seen_N)):
                    seen_N[n] = rounded(powers_K[n] * share, seen_N)


@kernel
def _backward(grad_SGQK: Any, probs_SGQK: Any, at_SL: Any, window: Any, scale: Any) -> None:
    num_seqs, num_heads, num_rows, num_keys = grad_SGQK.shape
    for s in range(num_seqs):
        for g in range(num_heads):
            for q in range(num_rows):
                row_K, at = grad_SGQK[s, g, q], at_SL[s, q % at_SL.shape[1]]
                first, stop = max(0, at - window + 1), min(at + 1, num_keys)
                grad_N, probs_N = row_K[first:stop], probs_SGQK[s, g, q, first:stop]
                along = F32(0.0)
                for n in range(len(grad_N)):
                    along += load(grad_N[n]) * load(probs_N[n])
                row_K[:first] = 0
                row_K[stop:] = 0
                for n in range(len(grad_N)):
                    slope = load(probs_N[n]) * (load(grad_N[n]) - along) * scale
                    grad_N[n] = rounded(slope, grad_N)


def softmax_(scores_SGQK: Tensor, at_SL: IntArray, window: int, scale: float) -> Tensor:
    """`reference` in place, on CPUs. `scale` is positive."""
    _forward(as_array(scores_SGQK), at_SL, window, F32(scale))
    return scores_SGQK


def softmax_backward_(
    grad_SGQK: Tensor, probs_SGQK: Tensor, at_SL: IntArray, window: int, scale: float
) -> Tensor:
    """The gradient of the unscaled scores, in place of that of the probabilities, on CPUs."""
    _backward(as_array(grad_SGQK), as_array(probs_SGQK), at_SL, window, F32(scale))
    return grad_SGQK
