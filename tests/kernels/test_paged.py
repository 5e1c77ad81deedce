import numpy as np
import pytest
import torch

from openmint.kernels import paged
from tests.kernels.compare import DTYPES, values

NUM_PAGES, PAGE, GROUPS, WIDTH = 9, 4, 2, 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_read_end_to_end(dtype):
    cache = values(NUM_PAGES, PAGE, GROUPS, WIDTH, dtype=dtype)
    pages = np.array([[7, 0, 0], [2, 5, 1]])
    read = paged.gather(cache, pages)
    for s, row in enumerate(pages):
        assert torch.equal(read[s], cache[row].flatten(0, 1).transpose(0, 1))
    other = values(NUM_PAGES, PAGE, GROUPS, WIDTH, dtype=dtype, seed=1)
    again = paged.gather(other, pages, read)
    assert again is read
    assert torch.equal(again, paged.gather(other, pages))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_finite_and_stands_in_its_place(dtype):
    cache = torch.zeros(NUM_PAGES, PAGE, GROUPS, WIDTH, dtype=dtype)
    fresh = values(3, GROUPS, WIDTH, dtype=dtype)
    fresh[1, 0, 0], fresh[1, 0, 1], fresh[1, 0, 2] = torch.nan, torch.inf, -torch.inf
    paged.write(fresh, np.array([5, 0, 35]), cache)
    flat = cache.flatten(0, 1)
    assert torch.equal(flat[5], fresh[0])
    assert torch.equal(flat[35], fresh[2])
    assert flat[0, 0, 0] == 0
    assert flat[0, 0, 1:3].abs().tolist() == pytest.approx([paged.LARGEST] * 2, rel=4e-3)
    assert torch.equal(flat[0, 0, 3:], fresh[1, 0, 3:])
    assert (cache != 0).sum() == 3 * GROUPS * WIDTH - 1
