"""Training sessions in device memory: fp32 master weights, moments, gradients, step count."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openmint.engine.optimizer import AdamState, SpareState, adamw
from openmint.errors import InvalidRequest, NotFound, Overloaded
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.types import AdamParams, BaseInfo, LoraSpec, RunId

BYTES_PER_PARAM = 4 * 4
"""fp32 weights, two moments and the gradient; the compute copy and the scratch come on top."""


class Run:
    """One training session. All of its tensors are flat vectors in one layout."""

    def __init__(
        self, layout: AdapterLayout, state: AdamState, dtype: torch.dtype, spare: SpareState
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.grads_P = torch.zeros_like(state.params_P)
        self.has_gradient = False
        self._spare = spare
        self.set_state(state)

    def set_state(self, state: AdamState) -> None:
        self.state = state
        self._is_private = False
        """Whether nobody else reads the state, so that its memory is ours to use again."""
        self.weights = AdapterWeights(self.layout, state.params_P.to(self.dtype))

    def own_state(self) -> None:
        """Nobody else has the state's vectors, unless they are the ones that compute."""
        self._is_private = self.weights.flat_P is not self.state.params_P

    def add_gradient(self, grads_P: Tensor) -> None:
        self.grads_P += grads_P
        self.has_gradient = True

    def read_gradient(self, read_into: Callable[[memoryview], None]) -> None:
        """Have what is read, fp32, be the accumulated gradient."""
        gradient_P = self.grads_P.cpu()
        self.has_gradient = True
        read_into(gradient_P.numpy().data)
        if gradient_P is not self.grads_P:
            self.grads_P.copy_(gradient_P)

    def clear_gradient(self) -> None:
        self.grads_P.zero_()
        self.has_gradient = False

    def prepare(self, adam: AdamParams) -> Update:
        """What one update makes of the accumulated gradient; the run stays as it is.

        Raises InvalidRequest for one that leaves the finite numbers.
        """
        state, grad_norm = adamw(self.state, self.grads_P, adam, self._spare)
        return Update(state, grad_norm, self.grads_P.cpu().numpy().data)

    def publish(self, update: Update) -> None:
        """Have the update take effect; its gradient is used up."""
        before, was_private = self.state, self._is_private
        self.set_state(update.state)
        self.own_state()
        if was_private:
            self._spare.give(before)
        self.clear_gradient()

    def discard(self, update: Update) -> None:
        """The update won't take effect; the gradient stays."""
        self._spare.give(update.state)

    def share_state(self) -> AdamState:
        """The state for others to read, who may keep it: no update will write into it."""
        self._is_private = False
        return self.state


@dataclass(frozen=True, slots=True)
class Update:
    """An update that is made and not yet in effect."""

    state: AdamState
    grad_norm: float
    """Before clipping."""
    gradient: memoryview
    """What it was made from, fp32; as it is until the update is published or discarded."""

    @property
    def num_optim_steps(self) -> int:
        return self.state.num_optim_steps


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run's state at one moment, safe to encode on another thread."""

    spec: LoraSpec
    state: AdamState
    grads_P: Tensor | None

    @property
    def num_optim_steps(self) -> int:
        return self.state.num_optim_steps

    def weights_only(self) -> RunSnapshot:
        """The same weights under a fresh optimizer, without a pending gradient."""
        return RunSnapshot(self.spec, AdamState.fresh(self.state.params_P), None)


class Runs:
    """The training sessions of one worker, within a byte budget."""

    def __init__(self, base: BaseInfo, dtype: torch.dtype, budget_bytes: int) -> None:
        self._base, self._dtype, self._budget_bytes = base, dtype, budget_bytes
        self._device = torch.device(base.device)
        self._runs: dict[RunId, Run] = {}
        self._spare = SpareState()

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, run_id: RunId) -> bool:
        return run_id in self._runs

    def __getitem__(self, run_id: RunId) -> Run:
        if run_id not in self._runs:
            raise NotFound(
                f"training run {run_id!r} is not in memory (finished, expired, or its worker was "
                "restarted); continue from a checkpoint with create_training_client_from_state"
            )
        return self._runs[run_id]

    @property
    def used_bytes(self) -> int:
        return sum(run.layout.num_params for run in self._runs.values()) * BYTES_PER_PARAM

    def layout(self, spec: LoraSpec) -> AdapterLayout:
        if not 1 <= spec.rank <= self._base.max_rank:
            limit = self._base.max_rank
            raise InvalidRequest(f"rank {spec.rank} is outside 1..{limit}")
        if not spec.groups:
            raise InvalidRequest("a policy must train at least one of attn, mlp, unembed")
        return AdapterLayout(spec, self._base.targets_of(spec))

    def create(self, run_id: RunId, spec: LoraSpec, seed: int) -> Run:
        """A fresh adapter. A ~ U(-1/sqrt(in), 1/sqrt(in)), as in peft's default; B = 0."""
        layout = self.layout(spec)
        generator = torch.Generator().manual_seed(seed)
        params_P = torch.zeros(layout.num_params)
        for a_RI, _ in layout.views(params_P).values():
            bound = 1.0 / math.sqrt(a_RI.shape[1])
            a_RI.uniform_(-bound, bound, generator=generator)
        run = self.put(run_id, layout, AdamState.fresh(params_P.to(self._device)))
        run.own_state()
        return run

    def put(self, run_id: RunId, layout: AdapterLayout, state: AdamState) -> Run:
        """Start a session with this state, or replace a live one."""
        others = self.used_bytes
        if run_id in self._runs:
            others -= self._runs[run_id].layout.num_params * BYTES_PER_PARAM
        needed = layout.num_params * BYTES_PER_PARAM
        if others + needed > self._budget_bytes:
            raise Overloaded(
                f"no memory for another training session: it needs {needed >> 20} MiB, "
                f"{others >> 20} of {self._budget_bytes >> 20} MiB are in use; finish a session, "
                "lower the rank, or raise worker.training_bytes",
                retry_after_seconds=30.0,
            )
        self._runs[run_id] = Run(layout, state, self._dtype, self._spare)
        return self._runs[run_id]

    def passing(self, weights: AdapterWeights) -> Run:
        """A session on these weights that is not kept, for a forward pass."""
        zeros_P = torch.zeros(weights.layout.num_params, device=self._device)
        state = AdamState(weights.flat_P.float(), zeros_P, zeros_P, 0)
        return Run(weights.layout, state, self._dtype, self._spare)

    def drop(self, run_id: RunId) -> None:
        self._runs.pop(run_id, None)

    def snapshot(self, run_id: RunId) -> RunSnapshot:
        """Weights, moments and pending gradient as they are now; only the gradient is copied."""
        run = self[run_id]
        grads_P = run.grads_P.clone() if run.has_gradient else None
        return RunSnapshot(run.layout.spec, run.share_state(), grads_P)
