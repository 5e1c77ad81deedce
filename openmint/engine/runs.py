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
from openmint.layers.shards import ONE_RANK, Shard, Shards
from openmint.types import AdamParams, BaseInfo, LoraSpec, RunId

BYTES_PER_PARAM = 4 * 4
"""fp32 weights, two moments and the gradient; the compute copy and the scratch come on top."""


class Run:
    """One training session. All of its tensors are flat vectors in one layout, that of this rank's
    part; what others get of it is whole, and so is what they give."""

    def __init__(
        self, shard: Shard, state: AdamState, dtype: torch.dtype, spare: SpareState
    ) -> None:
        self.shard, self.layout = shard, shard.layout
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
        self.has_gradient = True
        if self.grads_P.device.type == "cpu" and self.layout is self.shard.whole:
            read_into(self.grads_P.numpy().data)
            return
        gradient_P = torch.empty(self.shard.whole.num_params)
        read_into(gradient_P.numpy().data)
        self.grads_P.copy_(self.shard.take(gradient_P))

    def clear_gradient(self) -> None:
        self.grads_P.zero_()
        self.has_gradient = False

    def prepare(self, adam: AdamParams) -> Update:
        """What one update makes of the accumulated gradient; the run stays as it is.

        Raises InvalidRequest for one that leaves the finite numbers.
        """
        state, grad_norm = adamw(self.state, self.grads_P, adam, self._spare, self.shard)
        gradient_P = self.shard.gather(self.grads_P)
        return Update(state, grad_norm, gradient_P.cpu().numpy().data)

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
        return _each(self.state, self.shard.gather)

    def share_weights(self) -> AdapterWeights:
        """The weights that compute, likewise."""
        if self.layout is self.shard.whole:
            return self.weights
        return AdapterWeights(self.shard.whole, self.shard.gather(self.weights.flat_P))


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


def _each(state: AdamState, change: Callable[[Tensor], Tensor]) -> AdamState:
    """The state with each vector changed."""
    params_P, avg_P, avg_sq_P = state.params_P, state.exp_avg_P, state.exp_avg_sq_P
    return AdamState(change(params_P), change(avg_P), change(avg_sq_P), state.num_optim_steps)


class Runs:
    """The training sessions of one worker, within a byte budget."""

    def __init__(
        self, base: BaseInfo, dtype: torch.dtype, budget_bytes: int, shards: Shards = ONE_RANK
    ) -> None:
        self._base, self._dtype, self._budget_bytes = base, dtype, budget_bytes
        self._shards = shards
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

    def shard(self, spec: LoraSpec) -> Shard:
        """This rank's part of adapters of that shape. Raises InvalidRequest for one that can't
        be."""
        if not 1 <= spec.rank <= self._base.max_rank:
            limit = self._base.max_rank
            raise InvalidRequest(f"rank {spec.rank} is outside 1..{limit}")
        if not spec.groups:
            raise InvalidRequest("a policy must train at least one of attn, mlp, unembed")
        return self._shards.of(AdapterLayout(spec, self._base.targets_of(spec)))

    def create(self, run_id: RunId, spec: LoraSpec, seed: int) -> Run:
        """A fresh adapter. A ~ U(-1/sqrt(in), 1/sqrt(in)), as in peft's default; B = 0."""
        shard = self.shard(spec)
        generator = torch.Generator().manual_seed(seed)
        params_P = torch.zeros(shard.whole.num_params)
        for a_RI, _ in shard.whole.views(params_P).values():
            bound = 1.0 / math.sqrt(a_RI.shape[1])
            a_RI.uniform_(-bound, bound, generator=generator)
        own_P = shard.take(params_P).to(self._device)
        run = self._put(run_id, shard, AdamState.fresh(own_P))
        run.own_state()
        return run

    def restore(self, run_id: RunId, snapshot: RunSnapshot) -> Run:
        """Start a session with this state, or replace a live one."""
        shard = self.shard(snapshot.spec)
        run = self._put(run_id, shard, _each(snapshot.state, shard.take))
        if snapshot.grads_P is not None:
            run.add_gradient(shard.take(snapshot.grads_P))
        return run

    def _put(self, run_id: RunId, shard: Shard, state: AdamState) -> Run:
        others = self.used_bytes
        if run_id in self._runs:
            others -= self._runs[run_id].layout.num_params * BYTES_PER_PARAM
        needed = shard.layout.num_params * BYTES_PER_PARAM
        if others + needed > self._budget_bytes:
            raise Overloaded(
                f"no memory for another training session: it needs {needed >> 20} MiB, "
                f"{others >> 20} of {self._budget_bytes >> 20} MiB are in use; finish a session, "
                "lower the rank, or raise worker.training_bytes",
                retry_after_seconds=30.0,
            )
        self._runs[run_id] = Run(shard, state, self._dtype, self._spare)
        return self._runs[run_id]

    def passing(self, weights: AdapterWeights) -> Run:
        """A session on these weights that is not kept, for a forward pass."""
        shard = self._shards.of(weights.layout)
        params_P = shard.take(weights.flat_P).to(self._device).float()
        zeros_P = torch.zeros_like(params_P)
        return Run(shard, AdamState(params_P, zeros_P, zeros_P, 0), self._dtype, self._spare)

    def drop(self, run_id: RunId) -> None:
        self._runs.pop(run_id, None)

    def snapshot(self, run_id: RunId) -> RunSnapshot:
        """Weights, moments and pending gradient as they are now; only the gradient is copied."""
        run = self[run_id]
        grads_P = run.shard.gather(run.grads_P).clone() if run.has_gradient else None
        return RunSnapshot(run.layout.spec, run.share_state(), grads_P)
