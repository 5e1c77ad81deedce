"""Log-probabilities of chosen tokens, their gradient, and draws, straight from rows of logits.

R rows, V vocabulary, K candidates of a row. Nothing of size R x V is made: log p(v) is
`logits[v] - norm`, with `norm` the log of the row's sum of exponentials.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmint.kernels.jit import F32, as_array, exp, inlined, kernel, largest, load, rounded
from openmint.types import FloatArray, IntArray

BLOCK = 1024
"""Logits whose exponentials are summed in float32 before the sums meet in float64."""


def reference(logits_RV: Tensor) -> Tensor:
    """float32 log-probabilities of every token."""
    return torch.log_softmax(logits_RV.float(), dim=-1)


@inlined
def _powers(logits_N: Any, top: Any, cold: Any) -> Any:
    """The sum of `e^((logit - top) * cold)`."""
    total = F32(0.0)
    for n in range(len(logits_N)):
        total += exp((load(logits_N[n]) - top) * cold)
    return total


@kernel
def _norms(logits_RV: Any, norms_R: Any) -> None:
    for r in range(len(logits_RV)):
        logits_V = logits_RV[r]
        top, total = largest(logits_V), 0.0
        for start in range(0, len(logits_V), BLOCK):
            total += _powers(logits_V[start : start + BLOCK], top, F32(1.0))
        norms_R[r] = top + F32(np.log(total))


@kernel
def _gradient(logits_RV: Any, norms_R: Any, rows_N: Any, targets_RK: Any, slopes_RK: Any) -> None:
    """Row i becomes the gradient of row `rows_N[i] >= i`."""
    for i in range(len(rows_N)):
        r = rows_N[i]
        if r != i:
            logits_RV[i] = logits_RV[r]
        out_V, norm, weight = logits_RV[i], norms_R[r], F32(0.0)
        for k in range(slopes_RK.shape[1]):
            weight += slopes_RK[r, k]
        for v in range(len(out_V)):
            out_V[v] = rounded(-weight * exp(load(out_V[v]) - norm), out_V)
        for k in range(slopes_RK.shape[1]):
            target = targets_RK[r, k]
            out_V[target] = rounded(load(out_V[target]) + slopes_RK[r, k], out_V)


@kernel
def _draw(logits_RV: Any, heat_R: Any, uniform_R: Any, tokens_R: Any) -> None:
    parts = np.empty((logits_RV.shape[1] + BLOCK - 1) // BLOCK, np.float32)
    for r in range(len(logits_RV)):
        logits_V = logits_RV[r]
        top, token = largest(logits_V), 0
        while token < len(logits_V) - 1 and load(logits_V[token]) != top:
            token += 1
        tokens_R[r] = token
        if heat_R[r] == 0.0:
            continue
        cold, total = F32(1.0) / heat_R[r], 0.0
        for b in range(len(parts)):
            parts[b] = _powers(logits_V[b * BLOCK : (b + 1) * BLOCK], top, cold)
            total += parts[b]
        left, b = uniform_R[r] * total, 0
        while b < len(parts) - 1 and left >= parts[b]:
            left -= parts[b]
            b += 1
        for token in range(b * BLOCK, min((b + 1) * BLOCK, len(logits_V))):
            part = exp((load(logits_V[token]) - top) * cold)
            if part > 0.0:
                tokens_R[r] = token
            left -= part
            if left < 0.0:
                break


def norms(logits_RV: Tensor) -> FloatArray:
    """Log of each row's sum of exponentials."""
    if logits_RV.device.type != "cpu":
        return _on_host(logits_RV.float().logsumexp(dim=-1))
    norms_R = np.empty(len(logits_RV), np.float32)
    _norms(as_array(logits_RV), norms_R)
    return norms_R


def gradient_(
    logits_RV: Tensor,
    norms_R: FloatArray,
    rows_N: IntArray,
    targets_RK: IntArray,
    slopes_RK: FloatArray,
) -> Tensor:
    """dL/dlogits `[N, V]` of the rows `rows_N` (ascending); uses up the logits.

    `slopes_RK` are dL/dlog p of the targets: d log p_k / d logits = onehot(target_k) - softmax.
    """
    if logits_RV.device.type != "cpu":
        return gradient_reference(logits_RV, norms_R, rows_N, targets_RK, slopes_RK)
    _gradient(as_array(logits_RV), norms_R, rows_N, targets_RK, slopes_RK)
    return logits_RV[: len(rows_N)]


def draw(logits_RV: Tensor, heat_R: FloatArray, uniform_R: FloatArray) -> IntArray:
    """Each row's token: the likeliest at temperature 0, else the inverse of its distribution at
    `uniform_R`. A row's token depends on the row alone."""
    if logits_RV.device.type != "cpu":
        return draw_reference(logits_RV, heat_R, uniform_R)
    tokens_R = np.empty(len(logits_RV), np.int64)
    _draw(as_array(logits_RV), heat_R, uniform_R, tokens_R)
    return tokens_R


def gradient_reference(
    logits_RV: Tensor,
    norms_R: FloatArray,
    rows_N: IntArray,
    targets_RK: IntArray,
    slopes_RK: FloatArray,
) -> Tensor:
    norm_N1, slopes_NK, targets_NK = (
        torch.from_numpy(array[rows_N]).to(logits_RV.device)
        for array in (norms_R[:, None], slopes_RK, targets_RK)
    )
    probs_NV = (logits_RV[torch.from_numpy(rows_N).to(logits_RV.device)].float() - norm_N1).exp()
    grad_NV = probs_NV * -slopes_NK.sum(1, keepdim=True)
    return grad_NV.scatter_add_(1, targets_NK, slopes_NK).to(logits_RV.dtype)


def draw_reference(logits_RV: Tensor, heat_R: FloatArray, uniform_R: FloatArray) -> IntArray:
    if not heat_R.any():
        return np.asarray(_on_host(logits_RV.argmax(-1)))
    heat_R1 = torch.from_numpy(np.where(heat_R == 0.0, 1.0, heat_R))[:, None].to(logits_RV.device)
    sums_RV = (logits_RV.double() / heat_R1).softmax(-1).cumsum(-1)
    levels_R1 = torch.from_numpy(uniform_R).to(logits_RV.device)[:, None] * sums_RV[:, -1:]
    drawn_R = torch.searchsorted(sums_RV, levels_R1, right=True)[:, 0]
    drawn_R = drawn_R.clamp(max=logits_RV.shape[1] - 1)
    tokens_R: IntArray = np.where(heat_R == 0.0, _on_host(logits_RV.argmax(-1)), _on_host(drawn_R))
    return tokens_R


def _on_host(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()
