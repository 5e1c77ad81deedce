"""Arrays of the Tinker wire, protobuf or JSON, dense or CSR, as numpy arrays.

Every byte here is a stranger's: sizes are checked against the declared shape before anything is
allocated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from openmint.errors import InvalidRequest
from openmint.types import IntArray
from openmint.wire import proto

Array = npt.NDArray[np.generic]

MAX_DENSE_ELEMENTS = 1 << 25
"""Most elements that the CSR tensors of one request may unfold to."""
WIRE_DTYPES: dict[int, str] = {
    proto.FLOAT32: "<f4",
    proto.INT64: "<i8",
    proto.INT32: "<i4",
    proto.BFLOAT16: "<u2",
}


class TensorJson(BaseModel):
    """A tensor of the JSON wire."""

    model_config = ConfigDict(extra="forbid", strict=True)

    data: list[int | float]
    dtype: str
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Unfolding:
    """How many more elements the CSR tensors of one request may unfold to."""

    def __init__(self) -> None:
        self._left = MAX_DENSE_ELEMENTS

    def spend(self, num_elements: int, where: str) -> None:
        self._left -= num_elements
        if self._left < 0:
            raise InvalidRequest(
                f"{where}: the sparse tensors of this request unfold to more than "
                f"{MAX_DENSE_ELEMENTS} elements; send fewer data in one request"
            )


def from_proto(message: Any, where: str, unfolding: Unfolding) -> Array:
    """The dense array of a protobuf Tensor, int64 or float32. Raises InvalidRequest."""
    if message.dtype not in WIRE_DTYPES:
        raise InvalidRequest(f"{where}: dtype {message.dtype} is unknown; use float32 or int64")
    if not message.HasField("sparse_csr"):
        values = _values(message.dense, message.dtype, where)
        shape = tuple(message.shape) or (values.size,)
        return _reshape(values, shape, where)
    csr = message.sparse_csr
    return densify(
        _values(csr.values, message.dtype, where),
        from_bytes(csr.crow_indices, "<i8", f"{where} row indices"),
        from_bytes(csr.col_indices, "<i8", f"{where} column indices"),
        tuple(message.shape),
        where,
        unfolding,
    )


def from_json(tensor: TensorJson, where: str, unfolding: Unfolding, pad_value: int = 0) -> Array:
    """The dense array of a JSON tensor, int64 or float32. Raises InvalidRequest."""
    if tensor.dtype not in ("float32", "int64"):
        raise InvalidRequest(f"{where}: dtype {tensor.dtype!r} is unknown; use float32 or int64")
    values = numbers(tensor.data, np.dtype(tensor.dtype), where)
    if tensor.sparse_crow_indices is None and tensor.sparse_col_indices is None:
        shape = (values.size,) if tensor.shape is None else tuple(tensor.shape)
        return _reshape(values, shape, where)
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        raise InvalidRequest(f"{where}: send both sparse_crow_indices and sparse_col_indices")
    crow = numbers(tensor.sparse_crow_indices, np.dtype(np.int64), f"{where} row indices")
    col = numbers(tensor.sparse_col_indices, np.dtype(np.int64), f"{where} column indices")
    return densify(values, crow, col, tuple(tensor.shape or ()), where, unfolding, pad_value)


def numbers(values: Sequence[int | float], dtype: np.dtype[Any], where: str) -> Array:
    """A flat array of JSON numbers. Raises InvalidRequest for a fraction among integers."""
    if dtype.kind == "i" and any(isinstance(value, float) for value in values):
        raise InvalidRequest(f"{where}: integers wanted, got a fraction")
    try:
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype=dtype)
    except OverflowError:
        raise InvalidRequest(f"{where}: a number does not fit {dtype}") from None


def from_bytes(data: bytes, dtype: str, where: str) -> Array:
    """A flat array over raw little-endian bytes. Raises InvalidRequest when they do not divide."""
    item_bytes = np.dtype(dtype).itemsize
    if len(data) % item_bytes:
        raise InvalidRequest(
            f"{where}: {len(data)} bytes do not divide into {item_bytes}-byte items"
        )
    return np.frombuffer(data, dtype=dtype)


def densify(
    values: Array,
    crow: Array,
    col: Array,
    shape: tuple[int, ...],
    where: str,
    unfolding: Unfolding,
    pad_value: int = 0,
) -> Array:
    """The dense (rows, columns) array of a CSR tensor; unlisted cells hold `pad_value`.

    Raises InvalidRequest when indices and shape disagree, before the dense array is allocated.
    """
    if len(shape) != 2 or min(shape) < 0:
        raise InvalidRequest(f"{where}: a sparse tensor needs a shape of two sizes, got {shape}")
    num_rows, num_columns = shape
    rows = crow.astype(np.int64)
    # Neighbours are compared, not subtracted: a difference of int64 may wrap.
    fits = (
        rows.size == num_rows + 1
        and int(rows[0]) == 0
        and int(rows[-1]) == values.size == col.size
        and bool((rows[1:] >= rows[:-1]).all())
    )
    if not fits:
        raise InvalidRequest(f"{where}: sparse row indices do not match {values.size} values")
    if col.size and not (int(col.min()) >= 0 and int(col.max()) < num_columns):
        raise InvalidRequest(f"{where}: a sparse column index lies outside 0..{num_columns - 1}")
    unfolding.spend(num_rows * num_columns, where)
    dense = np.full(shape, pad_value, dtype=values.dtype)
    dense[np.repeat(np.arange(num_rows), np.diff(rows)), col] = values
    return dense


def tokens_from_bytes(data: bytes, where: str) -> IntArray:
    """Token ids of an encoded text chunk."""
    return from_bytes(data, "<i4", where).astype(np.int64)


def _values(data: bytes, dtype: int, where: str) -> Array:
    raw = from_bytes(data, WIRE_DTYPES[dtype], where)
    if dtype == proto.BFLOAT16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.int64 if dtype == proto.INT32 else raw.dtype.newbyteorder("="))


def _reshape(values: Array, shape: tuple[int, ...], where: str) -> Array:
    if min(shape, default=0) < 0 or math.prod(shape) != values.size:
        raise InvalidRequest(f"{where}: shape {list(shape)} does not hold {values.size} values")
    if not 1 <= len(shape) <= 2:
        raise InvalidRequest(f"{where}: shape {list(shape)} has {len(shape)} sizes; 1 or 2 wanted")
    return values.reshape(shape)
