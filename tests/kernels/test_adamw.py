"""The fused update is the reference to rounding, and leaves what it gets as it is."""

from __future__ import annotations

import torch

from openmint.kernels.adamw import BLOCK, Rates, reference, update

RATES = Rates(
    clip=0.5,
    one_minus_beta1=0.1,
    beta2=0.95,
    one_minus_beta2=0.05,
    correction=0.3,
    eps=1e-8,
    step=3e-3,
    decay=0.99,
)


def test_an_update_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = 2 * BLOCK + 7
    params_P, exp_avg_P, grads_P = torch.randn(3, shape, generator=generator)
    moments = params_P, exp_avg_P, torch.rand(shape, generator=generator)
    before = [tensor.clone() for tensor in (*moments, grads_P)]
    theirs = reference(moments, grads_P, RATES)
    for own, their in zip(update(moments, grads_P, RATES), theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-6, atol=1e-7)
    for old, now in zip(before, (*moments, grads_P), strict=True):
        assert torch.equal(old, now)
