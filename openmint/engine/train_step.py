"""Forward and backward of packed micro-batches over many policies, in one or several lanes.

Shapes: T packed tokens, N tokens of one datum, K target candidates, D hidden, V vocabulary,
C rows of a head chunk, P adapter parameters.

The stack runs under autograd; the head does not. Logits exist for one chunk of rows at a time,
where target log-probabilities, the loss, and the gradient back to the hidden states are computed
while they are at hand. That works because every loss is a sum of per-token terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from openmint.engine.lanes import Lanes
from openmint.engine.replay import Replay, RouteCounts
from openmint.engine.runs import Run
from openmint.kernels import logprobs
from openmint.layers.adapters import AdapterBatch, AdapterStack, GradientSink
from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.layers.linear import LogitsRoom
from openmint.losses.functions import LOSS_FUNCTIONS
from openmint.losses.spec import LOSSES
from openmint.models.model import Model
from openmint.types import AnyArray, BoolArray, Datum, FloatArray, IntArray, LossSpec

HEAD_ROWS = {"cpu": 128, "cuda": 1024}
"""Rows whose logits exist at once: 128 x 49,152 bf16 values are 13 MB, and stay in cache; on a GPU
each part costs a round trip to the host, and 1024 x 151,936 values are 0.3 GB."""
LANE_TOKENS = 64
"""Fewer tokens than this are not worth a lane of their own."""


@dataclass
class OpenTrain:
    """A train work that some micro-batches of may still be outstanding."""

    run: Run
    data: tuple[Datum, ...]
    loss: LossSpec
    forward_only: bool
    logprobs: list[FloatArray | None] = field(init=False)
    losses: list[float] = field(init=False)
    routes: dict[int, RouteCounts] = field(init=False, default_factory=dict)
    """By datum; empty where tokens choose nothing."""
    _grads: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.logprobs = [None] * len(self.data)
        self.losses = [0.0] * len(self.data)

    @property
    def config(self) -> dict[str, float]:
        return {**LOSSES[self.loss.name].config, **self.loss.config}

    @property
    def num_tokens(self) -> int:
        """Tokens that have run."""
        pairs = zip(self.data, self.logprobs, strict=True)
        return sum(len(datum.tokens_N) for datum, done in pairs if done is not None)

    def lane_gradient(self, lane: int) -> Tensor:
        """Where that lane adds its share of the work's gradient; nobody else does."""
        if lane not in self._grads:
            self._grads[lane] = torch.zeros_like(self.run.grads_P)
        return self._grads[lane]

    def gradient(self) -> Tensor | None:
        """The work's own gradient, lanes in order; added to the run's, or dropped whole."""
        if self.forward_only:
            return None
        lanes = [self._grads[lane] for lane in sorted(self._grads)]
        total_P = lanes[0] if lanes else torch.zeros_like(self.run.grads_P)
        for grads_P in lanes[1:]:
            total_P += grads_P
        return total_P


Item = tuple[OpenTrain, int]
"""One datum of a work."""


class Trainer:
    """Runs micro-batches on one model. Owned by the engine's thread."""

    def __init__(self, model: Model, lanes: Lanes) -> None:
        self._lanes = lanes
        self._parts = [TrainLane(model, lane) for lane in range(lanes.count)]

    def run(self, items: Sequence[Item]) -> None:
        """Run these data; log-probabilities, losses and gradients are left in their works.

        Data of one work, and works of one run, must stand together.
        """
        cuts = self._lanes.split([len(work.data[i].tokens_N) for work, i in items], LANE_TOKENS)
        shares = zip(self._parts, (items[cut] for cut in cuts), strict=False)
        self._lanes.run([partial(lane.run, own, wants_gradient(own)) for lane, own in shares])


class TrainLane:
    """One thread's share of a micro-batch."""

    def __init__(self, model: Model, lane: int) -> None:
        self._model, self._lane = model, lane
        self._device = model.head.device
        self._stack = AdapterStack([])
        self._logits = LogitsRoom(model.head)

    def run(self, items: Sequence[Item], needs_grad: bool) -> None:
        """Forward and, if asked for, backward of one packed batch."""
        works = list({id(work): work for work, _ in items}.values())
        lengths = [len(work.data[i].tokens_N) for work, i in items]
        tokens_T = np.concatenate([work.data[i].tokens_N for work, i in items])
        positions_T = np.concatenate([np.arange(length) for length in lengths])
        adapters = self._adapters(works, items, lengths)
        data, replay = [work.data[i] for work, i in items], None
        shape = self._model.route_shape
        if shape is not None and any(datum.routes is not None for datum in data):
            replay = Replay(data, shape, self._device)
        batch = Batch(PackedAttention(lengths, self._device), adapters, replay)
        with torch.set_grad_enabled(needs_grad):
            hidden_TD = self._model.forward(self._to(tokens_T), self._to(positions_T), batch)
        grad_TD = torch.zeros_like(hidden_TD) if needs_grad else None
        start = 0
        for work in works:
            own = [i for w, i in items if w is work]
            stop = start + sum(len(work.data[i].tokens_N) for i in own)
            grad = None if grad_TD is None or work.forward_only else grad_TD[start:stop]
            self._head(work, own, hidden_TD.detach()[start:stop], grad)
            start = stop
        if needs_grad:
            hidden_TD.backward(grad_TD)
        for index, (work, i) in enumerate(items if shape is not None else ()):
            unrecorded = RouteCounts(unrecorded=lengths[index])
            work.routes[i] = replay.counts(index) if replay is not None else unrecorded

    def _adapters(
        self, works: Sequence[OpenTrain], items: Sequence[Item], lengths: Sequence[int]
    ) -> AdapterBatch:
        """One slot per work, so that each work's gradient lands in its own vector."""
        if self._stack.adapters != tuple(work.run.weights for work in works):
            self._stack = AdapterStack([work.run.weights for work in works])
        slot_of = {id(work): slot for slot, work in enumerate(works)}
        slot_T = np.repeat([slot_of[id(work)] for work, _ in items], lengths)
        # A forward-only work shares the batch; its zero gradient needs a place to go.
        sinks = [work.lane_gradient(self._lane) for work in works]
        return AdapterBatch(self._stack, self._to(slot_T), GradientSink(self._stack, sinks))

    def _head(
        self, work: OpenTrain, own: list[int], hidden_TD: Tensor, grad_TD: Tensor | None
    ) -> None:
        """Log-probabilities and loss of one work's rows; writes dL/dhidden into `grad_TD`."""
        inputs = _stack_inputs([work.data[i] for i in own])
        is_out_T = torch.from_numpy(np.concatenate([_is_out(work.data[i]) for i in own]))
        targets_TK = inputs.pop("target_tokens").astype(np.int64)
        stack = AdapterStack([work.run.weights])
        slot_T = torch.zeros(len(hidden_TD), dtype=torch.int64, device=self._device)
        sink = GradientSink(stack, [work.lane_gradient(self._lane)])
        logprobs_TK = np.empty(targets_TK.shape, np.float32)
        losses_T = torch.empty(len(targets_TK), dtype=torch.float64)
        num_rows = HEAD_ROWS[self._device.type]
        for start in range(0, len(hidden_TD), num_rows):
            rows = slice(start, start + num_rows)
            adapters = AdapterBatch(stack, slot_T[rows], sink)
            chunk = HeadChunk(
                hidden_TD[rows],
                targets_TK[rows],
                {name: torch.from_numpy(value[rows]) for name, value in inputs.items()},
                is_out_T[rows],
                None if grad_TD is None else grad_TD[rows],
                self._logits.rows(len(hidden_TD[rows])),
            )
            logprobs_TK[rows], losses_T[rows] = head_chunk(self._model, work, adapters, chunk)
        _hand_out(work, own, logprobs_TK, losses_T)

    def _to(self, array: AnyArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


@dataclass(frozen=True, slots=True)
class HeadChunk:
    """Rows whose logits are at hand together, in `room_CV`, if it is given; `grad_CD` takes
    dL/dhidden, None when not wanted."""

    hidden_CD: Tensor
    targets_CK: IntArray
    inputs: dict[str, Tensor]
    is_out_C: Tensor
    """Rows that the loss leaves out."""
    grad_CD: Tensor | None
    room_CV: Tensor | None


def head_chunk(
    model: Model, work: OpenTrain, adapters: AdapterBatch, chunk: HeadChunk
) -> tuple[FloatArray, Tensor]:
    """Target log-probabilities `[C, K]` and losses `[C]`; gradients go where they belong."""
    head, targets_CK = model.head, chunk.targets_CK
    logits_CV, head_hidden_CR = head.forward(chunk.hidden_CD, adapters, chunk.room_CV)
    norms_C = logprobs.norms(logits_CV)
    chosen_CK = logits_CV.gather(1, torch.from_numpy(targets_CK).to(logits_CV.device))
    logprobs_CK = chosen_CK.float().cpu() - torch.from_numpy(norms_C)[:, None]
    logprobs_CK.requires_grad_()
    loss_CK = LOSS_FUNCTIONS[work.loss.name](logprobs_CK, chunk.inputs, work.config)
    loss_CK = loss_CK.masked_fill(chunk.is_out_C[:, None], 0.0)
    losses_C = loss_CK.detach().double().sum(1)
    if chunk.grad_CD is not None:
        (slope_CK,) = torch.autograd.grad(loss_CK.sum(), logprobs_CK)
        rows = slope_CK.ne(0).any(dim=1).nonzero().squeeze(1)
        if len(rows):
            slopes = (norms_C, rows.numpy(), targets_CK, slope_CK.numpy())
            grad_RV = logprobs.gradient_(logits_CV, *slopes)
            rows = rows.to(logits_CV.device)
            few = None if head_hidden_CR is None else head_hidden_CR[rows]
            hidden_RD = chunk.hidden_CD[rows]
            chunk.grad_CD[rows] = head.backward(grad_RV, hidden_RD, few, adapters.at(rows))
    return logprobs_CK.detach().numpy(), losses_C


def _is_out(datum: Datum) -> BoolArray:
    """Tokens beyond those whose routes are repeated: another route is another policy, so they have
    no part in the loss."""
    num_tokens = len(datum.tokens_N)
    routes = datum.routes
    num_kept = routes.num_tokens if routes is not None and routes.is_forced else num_tokens
    return np.arange(num_tokens) >= num_kept


def _stack_inputs(data: Sequence[Datum]) -> dict[str, AnyArray]:
    """Loss inputs of all rows, `(T, K)`; narrower data are padded with zero weight."""
    width = max(
        datum.inputs["target_tokens"].reshape(len(datum.tokens_N), -1).shape[1] for datum in data
    )
    return {
        name: np.concatenate(
            [_columns(datum.inputs[name], len(datum.tokens_N), width) for datum in data]
        )
        for name in data[0].inputs
    }


def _columns(value: AnyArray, num_tokens: int, width: int) -> AnyArray:
    value = value.reshape(num_tokens, -1)
    if value.shape[1] == width:
        return value
    return np.pad(value, ((0, 0), (0, width - value.shape[1])))


def wants_gradient(items: Sequence[Item]) -> bool:
    """Whether any of the works wants a gradient."""
    return not all(work.forward_only for work, _ in items)


def _hand_out(work: OpenTrain, own: list[int], logprobs_TK: FloatArray, losses_T: Tensor) -> None:
    """Give each datum its rows, in the shape of its targets."""
    start = 0
    for i in own:
        shape = work.data[i].inputs["target_tokens"].shape
        rows = slice(start, start + len(work.data[i].tokens_N))
        width = shape[1] if len(shape) == 2 else 1
        work.logprobs[i] = logprobs_TK[rows, :width].reshape(shape)
        work.losses[i] = float(losses_T[rows].sum())
        start = rows.stop
