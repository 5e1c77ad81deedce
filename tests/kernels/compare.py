"""A fused operation against its reference: values, and gradients by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
BOUNDS = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    # One rounding of 8 bits apart: the kernel rounds once where the reference may round twice.
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 2e-3},
}


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_same(
    fused: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Values in x's dtype; gradients against the reference in float32."""
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    out = fused(ours)
    torch.testing.assert_close(out, reference(x), **BOUNDS[x.dtype])
    grad = values(*out.shape, dtype=x.dtype, seed=1)
    out.backward(grad)
    exact = theirs.detach().float().requires_grad_()
    reference(exact).backward(grad.float())
    assert ours.grad is not None and exact.grad is not None
    torch.testing.assert_close(ours.grad.float(), exact.grad, **BOUNDS[x.dtype])
