"""Compile every kernel before it is needed: `python -m openmint.kernels.compile`.

It takes some seconds once per machine; afterwards the machine code is read from its cache.
"""

from __future__ import annotations

import numpy as np
import torch

from openmint.kernels import logprobs, norm, paged, rotary, softmax, swiglu


def compile_kernels(dtype: torch.dtype) -> None:
    """Have every kernel ready for tensors of this dtype."""
    x_TW = torch.ones(2, 8, dtype=dtype, requires_grad=True)
    ones_W, angles_TD = torch.ones(8, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    normed_TW = norm.FusedRMSNorm.apply(x_TW, ones_W, 1e-5)
    turned_TR, rest = rotary.FusedRotary.apply(normed_TW, angles_TD, angles_TD, 1)
    swiglu.FusedSwiGLU.apply(torch.cat((turned_TR, rest), dim=1)).sum().backward()
    scores_SGQK, at_SL = torch.ones(1, 1, 2, 2, dtype=dtype), np.arange(2)[None]
    probs_SGQK = softmax.softmax_(scores_SGQK, at_SL, 2, 1.0)
    softmax.softmax_backward_(torch.ones_like(probs_SGQK), probs_SGQK, at_SL, 2, 1.0)
    cache_PTGD, pages_SP = torch.ones(1, 2, 1, 4, dtype=dtype), np.zeros((1, 1), np.int64)
    paged.write(cache_PTGD[0], np.arange(2), cache_PTGD)
    paged.gather(cache_PTGD, pages_SP)
    logits_RV, rows_R = torch.ones(2, 4, dtype=dtype), np.arange(2)
    slopes_RK = np.ones((2, 1), np.float32)
    norms_R = logprobs.norms(logits_RV)
    logprobs.draw(logits_RV, slopes_RK[:, 0], slopes_RK[:, 0])
    logprobs.gradient_(logits_RV, norms_R, rows_R, rows_R[:, None], slopes_RK)


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float32):
        compile_kernels(dtype)
