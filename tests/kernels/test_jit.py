"""What every kernel rests on: bfloat16 rounding and exp."""

import numpy as np
import torch

from openmint.kernels.jit import as_array, exp, kernel, load, rounded


@kernel
def convert(x_N, y_N):
    for n in range(len(x_N)):
        y_N[n] = rounded(x_N[n], y_N)


@kernel
def widen(x_N, y_N):
    for n in range(len(x_N)):
        y_N[n] = load(x_N[n])


@kernel
def exponential(x_N, y_N):
    for n in range(len(x_N)):
        y_N[n] = exp(x_N[n])


def test_bfloat16_rounds_as_torch_does():
    values = torch.randn(100_000) * torch.logspace(-30, 30, 100_000)
    edges = [0.0, -0.0, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-45, 1.00390625, 1.01171875]
    values = torch.cat([values, torch.tensor(edges)])
    ours = torch.empty(len(values), dtype=torch.bfloat16)
    convert(as_array(values), as_array(ours))
    assert torch.equal(ours, values.bfloat16())
    back = torch.empty(len(values))
    widen(as_array(ours), as_array(back))
    assert torch.equal(back, ours.float())


def test_nan_stays_nan_through_bfloat16():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    ours = torch.empty(len(values), dtype=torch.bfloat16)
    convert(as_array(values), as_array(ours))
    assert ours.isnan().all()


def test_exp_is_within_its_bound():
    x = np.linspace(-87, 88, 1_000_003, dtype=np.float32)
    ours = np.empty_like(x)
    exponential(x, ours)
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(ours, exact, rtol=3e-7)


def test_exp_at_the_ends():
    x = np.array([-np.inf, -1e30, -88.5, 89.0, 1e30, np.inf, np.nan], np.float32)
    ours = np.empty_like(x)
    exponential(x, ours)
    np.testing.assert_array_equal(ours, [0, 0, 0, np.inf, np.inf, np.inf, np.nan])
