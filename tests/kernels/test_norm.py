import pytest

from openmint.kernels import norm
from tests.kernels.compare import DTYPES, assert_same, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (37, 576), (5, 3, 64)])
def test_rms_norm_and_its_gradient(shape, dtype):
    weight = values(shape[-1], dtype=dtype, seed=2)
    assert_same(
        lambda x: norm.FusedRMSNorm.apply(x, weight, 1e-5),
        lambda x: norm.reference(x, weight.to(x.dtype), 1e-5),
        values(*shape, dtype=dtype),
    )


def test_a_view_that_is_not_contiguous_is_taken_as_it_reads():
    whole = values(6, 20, dtype=DTYPES[0])
    weight = values(8, dtype=DTYPES[0], seed=2)
    part = whole[:, 4:12]
    assert_same(
        lambda x: norm.FusedRMSNorm.apply(x, weight, 1e-6),
        lambda x: norm.reference(x, weight, 1e-6),
        part,
    )
