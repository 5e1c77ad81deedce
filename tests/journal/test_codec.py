"""What is encoded comes back equal; what was not encoded does not come back at all."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmint.errors import StoreFailed
from openmint.journal.codec import Codec


@dataclass(frozen=True, slots=True)
class Point:
    at: object
    name: str = ""


@dataclass(frozen=True, slots=True)
class Stranger:
    at: int


CODEC = Codec([Point])
plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.builds(Point, inner)
    ),
    max_leaves=10,
)


@given(values)
def test_plain_values_come_back_equal(value):
    assert CODEC.decode(CODEC.encode(value)) == value


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.float64, np.bool_])
@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3), ()])
def test_arrays_come_back_to_the_bit_and_can_be_written_to(dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    other = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    back = CODEC.decode(CODEC.encode(Point((array, {"other": other}))))
    (first, rest) = back.at
    assert first.dtype == array.dtype
    np.testing.assert_array_equal(first, array)
    np.testing.assert_array_equal(rest["other"], other)
    first[...] = 0


def test_infinities_and_nan_survive():
    back = CODEC.decode(CODEC.encode((float("inf"), -float("inf"), float("nan"), -0.0)))
    assert repr(back) == "(inf, -inf, nan, -0.0)"


def test_only_known_classes_are_encoded_and_decoded():
    with pytest.raises(TypeError, match="not told of"):
        CODEC.encode(Stranger(1))
    with pytest.raises(StoreFailed, match="unreadable"):
        CODEC.decode(Codec([Stranger]).encode(Stranger(1)))


@given(st.binary(max_size=60))
def test_other_bytes_are_an_error_of_the_store(data):
    with pytest.raises(StoreFailed):
        CODEC.decode(data)


@given(st.integers(0, 200))
def test_a_cut_off_value_is_an_error_of_the_store(size):
    data = CODEC.encode(Point(np.arange(20), "x" * 20))
    if size < len(data):
        with pytest.raises(StoreFailed):
            CODEC.decode(data[:size])
