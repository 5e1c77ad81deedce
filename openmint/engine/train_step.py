"""Forward and backward of one packed micro-batch over many policies.

Shapes: T packed tokens, N tokens of one datum, K target candidates, D hidden, V vocabulary,
C rows of a head chunk, P adapter parameters.

The stack runs under autograd; the head does not. Logits exist for one chunk of rows at a time,
where target log-probabilities, the loss, and the gradient back to the hidden states are computed
while they are at hand. That works because every loss is a sum of per-token terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from openmint.engine.runs import Run
from openmint.layers.adapters import AdapterBatch, AdapterStack, GradientSink
from openmint.layers.attention import PackedAttention
from openmint.losses.functions import LOSS_FUNCTIONS
from openmint.losses.spec import LOSSES
from openmint.models.model import Batch, Model
from openmint.types import AnyArray, Datum, FloatArray, LossSpec

HEAD_ROWS = 128
"""Rows whose logits exist at once: 128 x 49,152 fp32 values are 25 MB."""


@dataclass
class OpenTrain:
    """A train work that some micro-batches of may still be outstanding."""

    run: Run
    data: tuple[Datum, ...]
    loss: LossSpec
    forward_only: bool
    grads_P: Tensor | None
    """The work's own gradient; added to the run's when all of it is done, or dropped whole."""
    logprobs: list[FloatArray | None] = field(init=False)
    loss_sum: float = 0.0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.logprobs = [None] * len(self.data)

    @property
    def config(self) -> dict[str, float]:
        return {**LOSSES[self.loss.name].config, **self.loss.config}


def train_micro_batch(model: Model, items: Sequence[tuple[OpenTrain, int]]) -> None:
    """Run these data; their log-probabilities, losses and gradients are left in their works.

    Data of one work, and works of one run, must stand together.
    """
    works = list(dict.fromkeys(id(work) for work, _ in items))
    by_id = {id(work): work for work, _ in items}
    needs_grad = not all(by_id[key].forward_only for key in works)
    device = model.head.weight_OI.device
    adapters, lengths = _adapters(items, device), [len(w.data[i].tokens_N) for w, i in items]
    tokens_T = np.concatenate([w.data[i].tokens_N for w, i in items])
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    batch = Batch(PackedAttention(lengths, device, model.window), adapters)
    with torch.set_grad_enabled(needs_grad):
        hidden_TD = model.forward(_to(tokens_T, device), _to(positions_T, device), batch)
    grad_TD = torch.zeros_like(hidden_TD) if needs_grad else None
    start = 0
    for key in works:
        work = by_id[key]
        own = [i for w, i in items if w is work]
        stop = start + sum(len(work.data[i].tokens_N) for i in own)
        grad = None if grad_TD is None or work.forward_only else grad_TD[start:stop]
        _head(model, work, own, hidden_TD.detach()[start:stop], grad)
        start = stop
    if needs_grad:
        hidden_TD.backward(grad_TD)


def _adapters(items: Sequence[tuple[OpenTrain, int]], device: torch.device) -> AdapterBatch:
    """One slot per work, so that each work's gradient lands in its own vector."""
    works = list({id(work): work for work, _ in items}.values())
    stack = AdapterStack([work.run.weights for work in works])
    # A forward-only work shares the batch; its zero gradient needs a place to go.
    sinks = [
        work.grads_P if work.grads_P is not None else torch.zeros_like(work.run.grads_P)
        for work in works
    ]
    slot_of = {id(work): slot for slot, work in enumerate(works)}
    slot_T = np.concatenate([np.full(len(w.data[i].tokens_N), slot_of[id(w)]) for w, i in items])
    return AdapterBatch(stack, _to(slot_T, device), GradientSink(stack, sinks))


def _head(
    model: Model, work: OpenTrain, own: list[int], hidden_TD: Tensor, grad_TD: Tensor | None
) -> None:
    """Log-probabilities and loss of one work's rows; writes dL/dhidden into `grad_TD`."""
    data = [work.data[i] for i in own]
    inputs = _stack_inputs(data, hidden_TD.device)
    targets_TK = inputs.pop("target_tokens").long()
    stack = AdapterStack([work.run.weights])
    slot_T = torch.zeros(len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
    sink = GradientSink(stack, [work.grads_P]) if work.grads_P is not None else None
    chunks = []
    for start in range(0, len(hidden_TD), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        adapters = AdapterBatch(stack, slot_T[rows], sink)
        chunk_inputs = {name: value[rows] for name, value in inputs.items()}
        grad_CD = None if grad_TD is None else grad_TD[rows]
        chunks.append(
            _head_chunk(
                model, work, adapters, hidden_TD[rows], targets_TK[rows], chunk_inputs, grad_CD
            )
        )
    _scatter_logprobs(work, own, torch.cat(chunks).cpu().numpy())


def _head_chunk(
    model: Model,
    work: OpenTrain,
    adapters: AdapterBatch,
    hidden_CD: Tensor,
    targets_CK: Tensor,
    inputs: dict[str, Tensor],
    grad_CD: Tensor | None,
) -> Tensor:
    """Target log-probabilities of a chunk; its loss and gradients go where they belong."""
    deltas = model.head.deltas(adapters)
    logits_CV, head_hidden = model.head.forward(hidden_CD, deltas)
    all_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    logprobs_CK = all_CV.gather(1, targets_CK).requires_grad_()
    loss_CK = LOSS_FUNCTIONS[work.loss.name](logprobs_CK, inputs, work.config)
    work.loss_sum += float(loss_CK.detach().double().sum())
    if grad_CD is None:
        return logprobs_CK.detach()
    (slope_CK,) = torch.autograd.grad(loss_CK.sum(), logprobs_CK)
    rows = slope_CK.ne(0).any(dim=1).nonzero().squeeze(1)
    if len(rows):
        # d lp_k / d logits = onehot(target_k) - softmax
        slope_RK = slope_CK[rows]
        grad_RV = (all_CV if len(rows) == len(all_CV) else all_CV[rows]).exp_()
        grad_RV.mul_(-slope_RK.sum(1, keepdim=True))
        grad_RV.scatter_add_(1, targets_CK[rows], slope_RK)
        grad_RV = grad_RV.to(hidden_CD.dtype)
        few = [h_CR[rows] for h_CR in head_hidden]
        grad_CD[rows] = model.head.backward(grad_RV, hidden_CD[rows], few, deltas, adapters)
    return logprobs_CK.detach()


def _stack_inputs(data: Sequence[Datum], device: torch.device) -> dict[str, Tensor]:
    """Loss inputs of all rows, `(T, K)`; narrower data are padded with zero weight."""
    width = max(
        datum.inputs["target_tokens"].reshape(len(datum.tokens_N), -1).shape[1] for datum in data
    )
    stacked: dict[str, Tensor] = {}
    for name in data[0].inputs:
        columns = [_columns(datum.inputs[name], len(datum.tokens_N), width) for datum in data]
        stacked[name] = _to(np.concatenate(columns), device)
    return stacked


def _columns(value: AnyArray, num_tokens: int, width: int) -> AnyArray:
    value = value.reshape(num_tokens, -1)
    if value.shape[1] == width:
        return value
    return np.pad(value, ((0, 0), (0, width - value.shape[1])))


def _scatter_logprobs(work: OpenTrain, own: list[int], logprobs_TK: FloatArray) -> None:
    start = 0
    for i in own:
        shape = work.data[i].inputs["target_tokens"].shape
        num_tokens = len(work.data[i].tokens_N)
        width = shape[1] if len(shape) == 2 else 1
        rows = logprobs_TK[start : start + num_tokens, :width]
        work.logprobs[i] = rows.reshape(shape).astype(np.float32)
        work.num_tokens += num_tokens
        start += num_tokens


def _to(array: AnyArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
