"""How the CPU kernels are compiled, and what they share: bfloat16 in and out, exp.

numba compiles a kernel for a dtype when it is first called, and keeps the machine code beside this
file (or in the user's cache folder where that can't be written). Kernels hold no GIL and use one
thread; who wants more calls them from several. numpy knows no bfloat16, so it travels as uint16.

The cache notices a change of the kernel's own file only: who edits this one runs `make clean`.

Inner loops run over whole rows, sliced before the loop: so LLVM can ask once per row what overlaps,
and vectorise (up to 10 times faster). A loop that sums writes to no row: where short rows might
overlap, the order of its sum would depend on where they lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from openmint.kernels.compiler import HAS_BF16, carray, intrinsic, ir, njit, overload, types
from openmint.types import AnyArray

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# What LLVM may do to vectorise sums. Infinities and NaNs keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp"}
F32 = np.float32


def kernel(function: Kernel) -> Kernel:
    """Compile `function` on first use, once per machine."""
    compile_lazily: Any = njit(
        nogil=True, fastmath=FAST, cache=True, error_model="numpy", boundscheck=False
    )
    return compile_lazily(function)


def piece(function: Kernel) -> Kernel:
    """A function that kernels call, compiled with them."""
    compile_lazily: Any = njit(fastmath=FAST, error_model="numpy", boundscheck=False)
    return compile_lazily(function)


def inlined(function: Kernel) -> Kernel:
    """A piece of kernels' expressions, compiled into each of them."""
    compile_lazily: Any = njit(inline="always", fastmath=FAST, error_model="numpy")
    return compile_lazily(function)


def as_array(tensor: Tensor) -> AnyArray:
    """The tensor's own memory for a kernel; bfloat16 as uint16. It must be contiguous."""
    assert tensor.is_contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: AnyArray = tensor.detach().numpy()
    return array


@intrinsic
def _float_of(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@cache
def bfloat() -> Any:
    """LLVM's bfloat, which llvmlite has no name for."""

    class BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
        def _to_string(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return type(other).__name__ == "BFloat"

        def __hash__(self) -> int:
            return hash("bfloat")

    return BFloat()


@intrinsic
def _narrowed(typing_context: Any, value: Any) -> Any:
    """The nearest bfloat16, by the machine's own instruction, to which denormal numbers are 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], bfloat()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def address(typing_context: Any, array: Any) -> Any:
    """Where an array's memory begins. Of a local array only while later lines name it; `scratch`
    is for the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(view.data, ir.IntType(64))

    return types.intp(array), generate


def scratch(size: int) -> Any:
    """A function for kernels: the address of so many bytes of the caller's stack, on whole cache
    lines. An array's memory is given back after the last line that names the array, whoever still
    holds its address; this lives as long as its caller."""

    @intrinsic
    def room(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(ir.IntType(8), size))
                memory.align = 64
            return builder.ptrtoint(memory, ir.IntType(64))

        return types.intp(), generate

    return room


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@inlined
def floats(address: Any, count: Any) -> Any:
    """float32 memory as an array that nobody counts."""
    return carray(_pointer(address), count, np.float32)


@inlined
def halves(address: Any, count: Any) -> Any:
    """bfloat16 memory as an array that nobody counts."""
    return carray(_pointer(address), count, np.uint16)


@inlined
def words(address: Any, count: Any) -> Any:
    """32-bit memory as an array that nobody counts."""
    return carray(_pointer(address), count, np.uint32)


@inlined
def ints(address: Any, count: Any) -> Any:
    """int64 memory as an array that nobody counts."""
    return carray(_pointer(address), count, np.int64)


@intrinsic
def int_at(typing_context: Any, address: Any, index: Any) -> Any:
    """An element of int64 memory. Arrays in tuples are counted at each use; addresses aren't."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(start, [arguments[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def float_at(typing_context: Any, address: Any, index: Any) -> Any:
    """An element of float32 memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ir.FloatType().as_pointer())
        return builder.load(builder.gep(start, [arguments[1]]))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def add_float(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Add to an element of float32 memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ir.FloatType().as_pointer())
        place = builder.gep(start, [arguments[1]])
        builder.store(builder.fadd(builder.load(place), arguments[2]), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


def load(value):
    """float32 of an array's element; for kernels only."""
    raise NotImplementedError


def rounded(value, like):
    """A float32 as an element of the array `like`, to the nearest, ties to even; for kernels only.

    NaN stays NaN: the largest payload would overflow into zero, so it loses its low bits first.
    """
    raise NotImplementedError


# numba wants the very signatures of the implementations, which can't be annotated.


@overload(load, inline="always")
def _load(value):
    if value == types.uint16:
        return lambda value: _float_of(np.uint32(value) << np.uint32(16))
    return lambda value: value


@overload(rounded, inline="always")
def _rounded(value, like):
    def to_bfloat16(value, like):
        bits = _bits_of(value)
        if value != value:
            return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
        lowest = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16((bits + np.uint32(0x7FFF) + lowest) >> np.uint32(16))

    if like.dtype == types.uint16 and HAS_BF16:
        return lambda value, like: _narrowed(value)
    if like.dtype == types.uint16:
        return to_bfloat16
    return lambda value, like: value


@inlined
def exp(x: Any) -> Any:
    """e^x in float32, within 3e-7 of it; 0 below -87, infinite above 88, NaN for NaN.

    Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], in a form that vectorises.
    """
    if x != x:
        return x
    x = min(max(x, F32(-88.0)), F32(89.0))
    n = np.floor(x * F32(1.44269504088896341) + F32(0.5))
    r = x - n * F32(0.693359375) - n * F32(-2.12194440e-4)
    y = F32(1.9875691500e-4)
    y = y * r + F32(1.3981999507e-3)
    y = y * r + F32(8.3334519073e-3)
    y = y * r + F32(4.1665795894e-2)
    y = y * r + F32(1.6666665459e-1)
    y = y * r + F32(5.0000001201e-1)
    y = y * (r * r) + r + F32(1.0)
    return y * _float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@inlined
def largest(row_N: Any) -> Any:
    """The largest element as float32; NaN when a positive NaN is among them.

    Floats order as their bits do, once those of negative ones are flipped; and LLVM vectorises the
    maximum of integers, but not that of floats, which may be NaN.
    """
    best = np.int32(-(2**31))
    for n in range(len(row_N)):
        bits = np.int32(_bits_of(load(row_N[n])))
        best = max(best, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return _float_of(np.uint32(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF))))
