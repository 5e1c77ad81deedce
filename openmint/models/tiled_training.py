"""Forward and backward of the dense family on AVX512-BF16: two kernels for the whole stack.

Shapes: T tokens, D hidden size, W values of all heads, V values of the query heads, F feed-forward
size, L layers, H query heads, R adapter rows, M targets, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from openmint.kernels import dense_train
from openmint.kernels.jit import as_array
from openmint.layers.adapters import AdapterBatch, adapters_of
from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.models.tiled_dense import WIDEST_FUSION, linears_of, stack_of
from openmint.types import AnyArray

if TYPE_CHECKING:
    from openmint.models.dense import DenseModel

KEPT_TOKENS = 512
"""Memory for the activations of so many tokens is kept for the next batch: fresh memory would have
to be cleared by the operating system first, which takes a twentieth of a step."""


class TiledTraining:
    """A dense model's frozen parts as the training kernels read them."""

    def __init__(self, model: DenseModel) -> None:
        self._linears = model.linears
        self._paths = tuple(path for linear in model.linears for path in linear.paths)
        self._rotary = model.rotary
        self._stack = stack_of(model)
        self._forth = linears_of(self._linears, lambda linear: linear.forth)
        self._back = linears_of(self._linears, lambda linear: linear.back)
        self._ends_4P = np.zeros((4, WIDEST_FUSION), np.int64)
        for n, linear in enumerate(self._linears[:4]):
            self._ends_4P[n, : len(linear.parts)] = [part.stop for part in linear.parts]
        self._spare: list[AnyArray] = []

    def forward(self, x_TD: Tensor, positions_T: Tensor, batch: Batch) -> Tensor:
        """Final hidden states of embeddings, differentiable."""
        hidden_TD: Tensor = _Trained.apply(x_TD, self, positions_T, batch)
        return hidden_TD

    def run(
        self, x_TD: Tensor, positions_T: Tensor, batch: Batch, goes_back: bool
    ) -> tuple[Tensor, _Passed]:
        """The forward pass."""
        assert isinstance(batch.attention, PackedAttention)
        cos_TD, sin_TD = self._rotary.at(positions_T, x_TD.dtype)
        angles = as_array(cos_TD), as_array(sin_TD)
        tokens = dense_train.Tokens(batch.attention.starts_S, *angles)
        widest = WIDEST_FUSION * batch.adapters.stack.widest if batch.adapters else 0
        memory, tape, room = self._memory(len(x_TD), widest, goes_back)
        tape.x_LTD[0] = as_array(x_TD.detach())
        normed_TD = torch.empty_like(x_TD)
        adapters = adapters_of(batch.adapters, self._linears, "forth")
        dense_train.forward(
            self._forth, self._stack, adapters, tokens, tape, room, as_array(normed_TD)
        )
        return normed_TD, _Passed(tokens, tape, room, memory)

    def run_back(self, passed: _Passed, grad_normed_TD: Tensor, batch: AdapterBatch | None) -> None:
        """The backward pass: adapters' gradients go to the batch's sink."""
        adapters = adapters_of(batch, self._linears, "back")
        arrays = as_array(grad_normed_TD.contiguous()), as_array(torch.zeros_like(grad_normed_TD))
        sink = self._sink(batch)
        dense_train.backward(
            self._back,
            self._stack,
            adapters,
            sink,
            passed.tokens,
            passed.tape,
            passed.room,
            *arrays,
        )

    def give_back(self, passed: _Passed) -> None:
        """Nobody reads the tape any more."""
        if len(passed.tokens.cos_TD) <= KEPT_TOKENS:
            self._spare.append(passed.memory)

    def _sink(self, batch: AdapterBatch | None) -> dense_train.Sink:
        if batch is None or batch.sink is None:
            nothing = np.zeros((0, 0), np.int64)
            runs_N3 = np.zeros((0, 3), np.int64)
            return dense_train.Sink(nothing, nothing, nothing[0:0, 0], runs_N3, self._ends_4P)
        a_MS, b_MS = batch.sink.places(self._paths)
        return dense_train.Sink(
            a_MS=a_MS,
            b_MS=b_MS,
            rank_S=np.array([adapter.spec.rank for adapter in batch.stack.adapters]),
            runs_N3=np.array(
                [(slot, rows.start, rows.stop) for slot, rows in batch.runs], np.int64
            ).reshape(-1, 3),
            ends_4P=self._ends_4P,
        )

    def _memory(
        self, num_tokens: int, widest: int, goes_back: bool
    ) -> tuple[AnyArray, dense_train.Tape, dense_train.Room]:
        """Memory, spare or new, and the arrays that it is made into."""
        halves, singles = self._shapes(num_tokens, widest, goes_back)
        memory = self._take(
            sum(_whole_lines(shape, 2) for shape in halves.values())
            + sum(_whole_lines(shape, 4) for shape in singles.values())
        )
        arrays, start = {}, 0
        for shapes, dtype, itemsize in ((halves, np.uint16, 2), (singles, np.float32, 4)):
            for name, shape in shapes.items():
                stop = start + prod(shape) * itemsize
                arrays[name] = memory[start:stop].view(dtype).reshape(shape)
                start += _whole_lines(shape, itemsize)
        tape, room = dense_train.Tape, dense_train.Room
        return (
            memory,
            tape(**{name: arrays[name] for name in tape._fields}),
            room(**{name: arrays[name] for name in room._fields}),
        )

    def _take(self, size: int) -> AnyArray:
        """Threads may ask at once."""
        try:
            memory = self._spare.pop()
        except IndexError:
            return np.empty(size, np.uint8)
        return memory if len(memory) >= size else np.empty(size, np.uint8)

    def _shapes(
        self, num_tokens: int, widest: int, goes_back: bool
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """Of the tape's and the room's arrays, bfloat16 ones and float32 ones."""
        qkv, out, gate_up, down = self._linears[:4]
        layers = len(self._linears) // 4 if goes_back else 1
        norms_heads = len(self._stack.q_norm_LD) > 0
        hidden, heads, values, tokens = qkv.num_in, qkv.num_out, out.num_in, num_tokens
        softened = (layers, self._stack.num_q, tokens)
        halves: dict[str, tuple[int, ...]] = {
            "x_LTD": (layers + 1, tokens, hidden),
            "middle_LTD": (layers, tokens, hidden),
            "normed_LTD": (2 * layers, tokens, hidden),
            "heads_LTW": (layers if norms_heads else 1, tokens, heads),
            "turned_LTW": (layers, tokens, heads),
            "attended_LTV": (layers, tokens, values),
            "gate_up_LTF": (layers, tokens, gate_up.num_out),
            "h_LTR": (4 * layers, tokens, widest),
            "active_TF": (tokens, down.num_in),
            "grad_active_TF": (tokens, down.num_in),
            "grad_gate_up_TF": (tokens, gate_up.num_out),
            "grad_normed_TD": (tokens, hidden),
            "grad_attended_TV": (tokens, values),
            "grad_turned_TW": (tokens, heads),
            "grad_heads_TW": (tokens, heads),
            "grad_raw_TW": (tokens if norms_heads else 0, heads),
            "grad_h_TR": (tokens, widest),
        }
        singles = {
            "scale_LT": (2 * layers + 1, tokens),
            "top_LHT": softened,
            "share_LHT": softened,
        }
        return halves, singles


@dataclass(frozen=True, slots=True)
class _Passed:
    """What a forward pass leaves for the way back, and the memory that it is in. The result is not
    part of it: autograd's node would hold its own output, and neither would ever be let go."""

    tokens: dense_train.Tokens
    tape: dense_train.Tape
    room: dense_train.Room
    memory: AnyArray


class _Trained(torch.autograd.Function):
    """`TiledTraining` under autograd. Embeddings are frozen, so no gradient leaves it."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, training: TiledTraining, positions_T: Tensor, batch: Batch
    ) -> Tensor:
        normed_TD, passed = training.run(x_TD, positions_T, batch, goes_back=x_TD.requires_grad)
        if x_TD.requires_grad:
            ctx.call = (training, passed, batch)
        else:
            training.give_back(passed)
        return normed_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        training, passed, batch = ctx.call
        training.run_back(passed, grads[0], batch.adapters)
        training.give_back(passed)
        return None, None, None, None


def _whole_lines(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes, up to a whole cache line."""
    return -(-prod(shape) * itemsize // 64) * 64
