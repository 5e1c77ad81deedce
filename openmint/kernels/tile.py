"""Small matrix products on AVX512-BF16: what every product of a bfloat16 model on a CPU is made of.

A tile multiplies up to six rows of x with up to 64 columns of W and keeps their sums in registers.
Each sum runs over pairs of the inner dimension, in order, in one accumulator of the instruction
`vdpbf16ps`; so a product is the same to the bit whatever rows stand beside it, and whoever computes
it: trainer, prefill or decode step. The functions here take addresses and strides in bytes, and are
for kernels only.

Layouts of W, whose rows are outputs:
- panels: 64 outputs, `[out / 64, in / 2, 64, 2]`: one tile reads a panel from front to back.
- strips: 8 outputs, `[out / 8, in / 2, 8, 2]`: for the few rows of a LoRA A.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from openmint.kernels.compiler import HAS_BF16, intrinsic, ir, types
from openmint.kernels.huge import HugeMemory
from openmint.kernels.jit import bfloat, piece

IS_AVAILABLE = HAS_BF16
"""Whether this machine has the instruction; elsewhere torch multiplies."""
PANEL, STRIP, LANES = 64, 8, 16
MOST_ROWS = 6
"""Rows of a tile: 6 x 4 sums, 4 columns of W and one of x fill the 32 registers."""
OUTER = 32
"""Columns of an outer product."""
STRIP_SUMS = 4
"""Partial sums of each output of a strip, which hide the instruction's latency."""


def _int32(value: int) -> Any:
    return ir.Constant(ir.IntType(32), value)


def _int64(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


class _Emitter:
    """Writes LLVM code for sums of `lanes` columns."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self._lanes = builder, lanes
        self.sums = ir.VectorType(ir.FloatType(), lanes)
        self._pairs = ir.VectorType(bfloat(), 2 * lanes)
        self._words = ir.VectorType(ir.IntType(32), lanes)

    def call(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """Call one of LLVM's own functions."""
        module = self.builder.module
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(function, arguments)

    def at(self, address: Any, stride: Any, count: int) -> Any:
        stride = stride if isinstance(stride, ir.Value) else _int64(stride)
        return self.builder.add(address, self.builder.mul(stride, _int64(count)))

    def load_sums(self, address: Any) -> Any:
        loaded = self.builder.load(self.builder.inttoptr(address, self.sums.as_pointer()))
        loaded.align = 4
        return loaded

    def store_sums(self, value: Any, address: Any) -> None:
        place = self.builder.inttoptr(address, self.sums.as_pointer())
        self.builder.store(value, place).align = 4

    def columns(self, address: Any) -> Any:
        """A pair of each of W's columns."""
        return self.builder.bitcast(self.load_sums(address), self._pairs)

    def byte_columns(self, address: Any) -> Any:
        """The same of int8 values; bfloat16 holds all of them."""
        builder, bytes_N = self.builder, ir.VectorType(ir.IntType(8), self._lanes)
        halves = []
        for half in range(2):
            place = builder.inttoptr(self.at(address, self._lanes, half), bytes_N.as_pointer())
            loaded = builder.load(place)
            loaded.align = 1
            halves.append(builder.sitofp(builder.sext(loaded, self._words), self.sums))
        high_first = [halves[1], halves[0]]
        return self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", self._pairs, high_first)

    def pair(self, address: Any) -> Any:
        """One pair of x, for every column."""
        word = self.builder.load(self.builder.inttoptr(address, ir.IntType(32).as_pointer()))
        word.align = 2
        return self.builder.bitcast(self._everywhere(word), self._pairs)

    def _everywhere(self, word: Any) -> Any:
        """32 bits, for every column."""
        nothing = ir.Constant(self._words, ir.Undefined)
        first = self.builder.insert_element(nothing, word, _int32(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(self._words, None))

    def add_product(self, total: Any, columns: Any, pair: Any) -> Any:
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self._lanes}"
        return self.call(name, self.sums, [total, columns, pair])

    def add_products(self, totals: list[Any], columns: list[Any], pairs: list[Any]) -> list[Any]:
        """One more pair for the sums of all rows, whose columns stand one after another."""
        factors = [(column, pair) for pair in pairs for column in columns]
        added = zip(totals, factors, strict=True)
        return [self.add_product(total, column, pair) for total, (column, pair) in added]

    def paired(self, first: Any, second: Any) -> list[Any]:
        """Columns of two rows of `2 * lanes` bfloat16 values each, value by value in pairs."""
        rows, width = [self.columns(first), self.columns(second)], 2 * self._lanes
        orders = [
            [n for c in range(width) for n in (c, width + c)][i : i + width] for i in (0, width)
        ]
        kind = ir.VectorType(ir.IntType(32), width)
        return [self.builder.shuffle_vector(*rows, ir.Constant(kind, order)) for order in orders]

    def loop(self, count: Any, starts: list[Any], body: Any) -> list[Any]:
        """`body(index, totals)` gives the next totals, `count >= 1` times."""
        builder, entry = self.builder, self.builder.block
        block, after = (builder.function.append_basic_block(name) for name in ("sum", "summed"))
        builder.branch(block)
        builder.position_at_end(block)
        index, totals = builder.phi(ir.IntType(64)), [builder.phi(start.type) for start in starts]
        news = body(index, totals)
        following = builder.add(index, _int64(1))
        for phi, start, new in zip(
            [index, *totals], [_int64(0), *starts], [following, *news], strict=True
        ):
            phi.add_incoming(start, entry)
            phi.add_incoming(new, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), block, after)
        builder.position_at_end(after)
        return news

    def fetch(self, address: Any) -> None:
        """Have a cache line brought near; any address will do."""
        how = [_int32(value) for value in (0, 2, 1)]  # to read, into L2, data
        place = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), [place, *how])

    def fetch_next(self, index: Any, near: Any) -> None:
        """The two lines of a tile's pair, see `_tile`."""
        ahead, lines, lines_stride = (self.builder.extract_value(near, n) for n in range(3))
        self.fetch(self.at(ahead, index, 64))
        entry = self.builder.add(lines, self.builder.mul(lines_stride, index))
        word = self.builder.inttoptr(entry, ir.IntType(64).as_pointer())
        self.fetch(self.builder.load(word))

    def zero(self) -> Any:
        return ir.Constant(self.sums, [0.0] * self._lanes)


def _tile(rows: int, vectors: int, adds: bool, of_bytes: bool = False) -> Any:
    """`tile(x, x_stride, w, w_stride, pairs, out, out_stride, near)`: float32 sums of `rows` rows
    and `vectors * 16` columns, `adds` to what is there or not. `w_stride` is from one pair of W to
    the next.

    If `near` is `(ahead, lines, lines_stride)`, two cache lines are brought near with each pair of
    W: the next from `ahead` on, and the one whose address is the next in a list; from one entry of
    it to the next are `lines_stride` bytes.
    """

    @intrinsic
    def tile(
        typing: Any,
        x: Any,
        x_stride: Any,
        w: Any,
        w_stride: Any,
        pairs: Any,
        out: Any,
        out_stride: Any,
        near: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, w, w_stride, pairs, out, out_stride, near = arguments
            emit = _Emitter(builder, LANES)
            xs = [emit.at(x, x_stride, row) for row in range(rows)]
            places = [
                emit.at(emit.at(out, out_stride, row), 64, vector)
                for row in range(rows)
                for vector in range(vectors)
            ]

            def body(index: Any, totals: list[Any]) -> list[Any]:
                here = builder.add(w, builder.mul(w_stride, index))
                read, size = (emit.byte_columns, 32) if of_bytes else (emit.columns, 64)
                columns = [read(emit.at(here, size, v)) for v in range(vectors)]
                if fetches:
                    emit.fetch_next(index, near)
                pairs = [emit.pair(emit.at(each, index, 4)) for each in xs]
                return emit.add_products(totals, columns, pairs)

            starts = [emit.load_sums(place) if adds else emit.zero() for place in places]
            for total, place in zip(emit.loop(pairs, starts, body), places, strict=True):
                emit.store_sums(total, place)
            return context.get_dummy_value()

        fetches = isinstance(near, types.UniTuple)
        return types.void(*[types.intp] * 7, near), generate

    return tile


def _strip(rows: int) -> Any:
    """`strip(x, x_stride, w, pairs, out)`: float32 sums `[rows, 8]`; pairs are a multiple of 4."""

    @intrinsic
    def strip(typing: Any, x: Any, x_stride: Any, w: Any, pairs: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, w, pairs, out = arguments
            emit = _Emitter(builder, STRIP)
            xs = [emit.at(x, x_stride, row) for row in range(rows)]

            def body(index: Any, totals: list[Any]) -> list[Any]:
                here = emit.at(w, index, 32 * STRIP_SUMS)
                columns = [emit.columns(emit.at(here, 32, part)) for part in range(STRIP_SUMS)]
                news = []
                for row in range(rows):
                    place = emit.at(xs[row], index, 4 * STRIP_SUMS)
                    for part in range(STRIP_SUMS):
                        total = totals[row * STRIP_SUMS + part]
                        pair = emit.pair(emit.at(place, 4, part))
                        news.append(emit.add_product(total, columns[part], pair))
                return news

            starts = [emit.zero()] * (rows * STRIP_SUMS)
            rounds = builder.sdiv(pairs, _int64(STRIP_SUMS))
            totals = emit.loop(rounds, starts, body)
            for row in range(rows):
                a, b, c, d = totals[row * STRIP_SUMS : (row + 1) * STRIP_SUMS]
                total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
                emit.store_sums(total, emit.at(out, 32, row))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return strip


def _quad(rows: int) -> Any:
    """`quad(x, x_stride, w0, w1, w2, w3, w_stride, pairs, out, out_stride)`: a tile whose 4 x 16
    columns stand in four places."""

    @intrinsic
    def quad(
        typing: Any,
        x: Any,
        x_stride: Any,
        w0: Any,
        w1: Any,
        w2: Any,
        w3: Any,
        w_stride: Any,
        pairs: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, *ws, w_stride, pairs, out, out_stride = arguments
            emit = _Emitter(builder, LANES)
            xs = [emit.at(x, x_stride, row) for row in range(rows)]

            def body(index: Any, totals: list[Any]) -> list[Any]:
                skipped = builder.mul(w_stride, index)
                columns = [emit.columns(builder.add(w, skipped)) for w in ws]
                pairs = [emit.pair(emit.at(each, index, 4)) for each in xs]
                return emit.add_products(totals, columns, pairs)

            totals = emit.loop(pairs, [emit.zero()] * (4 * rows), body)
            for place, total in enumerate(totals):
                row = emit.at(out, out_stride, place // 4)
                emit.store_sums(total, emit.at(row, 64, place % 4))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), generate

    return quad


def _outer() -> Any:
    """`outer(h, h_stride, x, x_stride, pairs, out, out_stride)`: `out += h.T @ x` in float32, of 8
    columns of h, whose tokens stand in pairs, `[pairs, 8, 2]`, and 32 of x, whose rows are tokens.
    """

    @intrinsic
    def outer(
        typing: Any,
        h: Any,
        h_stride: Any,
        x: Any,
        x_stride: Any,
        pairs: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            h, h_stride, x, x_stride, pairs, out, out_stride = arguments
            emit = _Emitter(builder, LANES)
            places = [
                emit.at(emit.at(out, out_stride, n // 2), 64, n % 2) for n in range(2 * STRIP)
            ]

            def body(index: Any, totals: list[Any]) -> list[Any]:
                row = builder.add(x, builder.mul(x_stride, emit.at(index, index, 1)))
                columns = emit.paired(row, builder.add(row, x_stride))
                own = builder.add(h, builder.mul(h_stride, index))
                return emit.add_products(
                    totals, columns, [emit.pair(emit.at(own, 4, r)) for r in range(STRIP)]
                )

            starts = [emit.load_sums(place) for place in places]
            for total, place in zip(emit.loop(pairs, starts, body), places, strict=True):
                emit.store_sums(total, place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return outer


def _finish(adds: bool) -> Any:
    """`finish(sums, y)`: 64 sums, rounded to bfloat16, to y; or `adds` them to what is there."""

    @intrinsic
    def finish(typing: Any, sums: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit = _Emitter(builder, LANES)
            short = ir.VectorType(bfloat(), LANES)
            for vector in range(PANEL // LANES):
                total = emit.load_sums(emit.at(arguments[0], 64, vector))
                place = builder.inttoptr(emit.at(arguments[1], 32, vector), short.as_pointer())
                value = builder.fptrunc(total, short)
                if adds:
                    there = builder.load(place)
                    there.align = 2
                    both = (builder.fpext(each, emit.sums) for each in (there, value))
                    value = builder.fptrunc(builder.fadd(*both), short)
                builder.store(value, place).align = 2
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return finish


def _up_to_six(tiles: list[Any]) -> Any:
    """One function for tiles of one to six rows: `f(rows, ...)`."""
    one, two, three, four, five, six = tiles

    @piece
    def run(
        rows: Any,
        x: Any,
        x_stride: Any,
        w: Any,
        w_stride: Any,
        pairs: Any,
        out: Any,
        out_stride: Any,
        near: Any = (),
    ) -> None:
        if rows == 6:
            six(x, x_stride, w, w_stride, pairs, out, out_stride, near)
        elif rows == 5:
            five(x, x_stride, w, w_stride, pairs, out, out_stride, near)
        elif rows == 4:
            four(x, x_stride, w, w_stride, pairs, out, out_stride, near)
        elif rows == 3:
            three(x, x_stride, w, w_stride, pairs, out, out_stride, near)
        elif rows == 2:
            two(x, x_stride, w, w_stride, pairs, out, out_stride, near)
        else:
            one(x, x_stride, w, w_stride, pairs, out, out_stride, near)

    return run


_ROWS = range(1, MOST_ROWS + 1)
tile = _up_to_six([_tile(rows, 4, adds=False) for rows in _ROWS])
"""`out = x @ w`, 64 columns."""
byte_tile = _up_to_six([_tile(rows, 4, adds=False, of_bytes=True) for rows in _ROWS])
"""`tile` of int8 panels."""
add_tile = _up_to_six([_tile(rows, 4, adds=True) for rows in _ROWS])
"""`out += x @ w`, 64 columns."""
slim_tile = _up_to_six([_tile(rows, 1, adds=False) for rows in _ROWS])
"""`out = x @ w`, 16 columns."""
add_slim_tile = _up_to_six([_tile(rows, 1, adds=True) for rows in _ROWS])
"""`out += x @ w`, 16 columns."""
_strip1, _strip4 = _strip(1), _strip(4)
_quad1, _quad2, _quad3, _quad4 = (_quad(rows) for rows in range(1, 5))
outer = _outer()
finish, finish_adding = _finish(False), _finish(True)


@piece
def quad(
    rows: Any,
    x: Any,
    x_stride: Any,
    w0: Any,
    w1: Any,
    w2: Any,
    w3: Any,
    w_stride: Any,
    pairs: Any,
    out: Any,
    out_stride: Any,
) -> None:
    """`slim_tile` of four places at once: 64 columns."""
    if rows == 4:
        _quad4(x, x_stride, w0, w1, w2, w3, w_stride, pairs, out, out_stride)
    elif rows == 3:
        _quad3(x, x_stride, w0, w1, w2, w3, w_stride, pairs, out, out_stride)
    elif rows == 2:
        _quad2(x, x_stride, w0, w1, w2, w3, w_stride, pairs, out, out_stride)
    else:
        _quad1(x, x_stride, w0, w1, w2, w3, w_stride, pairs, out, out_stride)


@piece
def strip(rows: Any, x: Any, x_stride: Any, w: Any, pairs: Any, out: Any) -> None:
    """`out = x @ w`, one row or four, 8 columns; a row's sum is the same in both."""
    if rows == 4:
        _strip4(x, x_stride, w, pairs, out)
    else:
        _strip1(x, x_stride, w, pairs, out)


_memory = HugeMemory()


def panels(weight_OI: Tensor) -> Tensor:
    """W as panels; outputs are padded with zeros to a multiple of 64, inputs to one of 2."""
    return _blocks(weight_OI, PANEL)


def strips(weight_OI: Tensor) -> Tensor:
    """W as strips; outputs are padded with zeros to a multiple of 8."""
    return _blocks(weight_OI, STRIP)


def _blocks(weight_OI: Tensor, width: int) -> Tensor:
    num_out, num_in = weight_OI.shape
    padded_OI = F.pad(weight_OI, (0, -num_in % 2, 0, -num_out % width))
    blocks = padded_OI.view(-1, width, padded_OI.shape[1] // 2, 2).transpose(1, 2)
    room = _memory.take(blocks.nbytes).view(weight_OI.dtype)
    return room.view(blocks.shape).copy_(blocks)
