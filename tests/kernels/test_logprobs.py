import numpy as np
import pytest
import torch

from openmint.kernels import logprobs
from tests.kernels.compare import DTYPES, values

VOCAB = 2500
"""More than two blocks, the last of them short."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_give_log_probabilities(dtype):
    logits = 5 * values(7, VOCAB, dtype=dtype)
    ours = logits.float() - torch.from_numpy(logprobs.norms(logits))[:, None]
    torch.testing.assert_close(ours, logprobs.reference(logits), rtol=1e-5, atol=1e-5)


def test_a_row_with_nan_has_no_norm():
    logits = values(2, VOCAB, dtype=torch.float32)
    logits[1, 1700] = torch.nan
    norms = logprobs.norms(logits)
    assert np.isfinite(norms[0]) and np.isnan(norms[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 4], [3]])
def test_the_gradient_of_chosen_rows(rows, dtype):
    numbers = np.random.default_rng(0)
    logits = 3 * values(5, VOCAB, dtype=dtype)
    targets = numbers.integers(0, VOCAB, (5, 3))
    targets[4, 1] = targets[4, 0]  # one token twice among the candidates
    slopes = numbers.normal(size=(5, 3)).astype(np.float32)
    exact = logits.float().requires_grad_()
    chosen = logprobs.reference(exact).gather(1, torch.from_numpy(targets))
    (chosen * torch.from_numpy(slopes))[rows].sum().backward()
    arguments = (logprobs.norms(logits), np.array(rows), targets, slopes)
    expected = exact.grad[rows]
    slow = logprobs.gradient_reference(logits, *arguments)
    fast = logprobs.gradient_(logits.clone(), *arguments)
    bounds = (
        {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-5}
    )
    torch.testing.assert_close(slow.float(), expected, **bounds)
    torch.testing.assert_close(fast.float(), expected, **bounds)


def test_draws_are_those_of_the_reference_and_of_the_row_alone():
    logits = 2 * values(400, VOCAB, dtype=torch.float32)
    numbers = np.random.default_rng(1)
    heat = numbers.choice([0.0, 0.5, 1.0, 2.0], 400).astype(np.float32)
    uniform = numbers.random(400).astype(np.float32)
    ours = logprobs.draw(logits, heat, uniform)
    theirs = logprobs.draw_reference(logits, heat, uniform)
    # A uniform number within rounding of a boundary may fall to either side.
    assert (ours == theirs).mean() > 0.99
    np.testing.assert_array_equal(ours[heat == 0.0], logits.argmax(1)[heat == 0.0])
    alone = [
        logprobs.draw(logits[i : i + 1], heat[i : i + 1], uniform[i : i + 1])[0] for i in range(9)
    ]
    np.testing.assert_array_equal(ours[:9], alone)


def test_draws_never_leave_the_kept_tokens():
    logits = values(64, VOCAB, dtype=torch.float32)
    kept = torch.zeros(VOCAB, dtype=torch.bool)
    kept[[3, 1500, 2400]] = True
    logits[:, ~kept] = -torch.inf
    uniform = np.linspace(0, 1, 64, dtype=np.float32)
    drawn = logprobs.draw(logits, np.ones(64, np.float32), uniform)
    assert set(drawn) == {3, 1500, 2400}
