"""Updates write into the memory of states that nobody reads any more, and into no other."""

from __future__ import annotations

import pytest
import torch

from openmint.engine.optimizer import AdamState, SpareState, adamw
from openmint.engine.runs import Runs
from openmint.types import AdamParams, BaseInfo, Digest, LoraSpec, RunId, TargetModule, stacks_of

SPEC = LoraSpec(rank=2, train_attn=False, train_unembed=False)
ADAM = AdamParams(learning_rate=1e-2)
A, B = RunId("a"), RunId("b")


def runs_in(dtype: torch.dtype) -> Runs:
    stacks = stacks_of([TargetModule("model.layers.0.mlp.up_proj", "mlp", 6, 10)])
    digest = Digest("sha256:" + "0" * 64)
    name = str(dtype).removeprefix("torch.")
    base = BaseInfo("tiny", digest, "llama", "", name, "cpu", 96, 64, (2,), 1, 1, 8, stacks)
    return Runs(base, dtype, 1 << 20)


def gradient(i: int) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(i))


def vectors(state: AdamState) -> list[torch.Tensor]:
    return [state.params_P, state.exp_avg_P, state.exp_avg_sq_P]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_runs_that_share_spare_memory_update_as_if_alone(dtype: torch.dtype) -> None:
    runs = runs_in(dtype)
    states = {}
    for seed, run_id in enumerate((A, B)):
        states[run_id] = AdamState.fresh(runs.create(run_id, SPEC, seed).state.params_P.clone())
    for step in range(6):
        for run_id in (A, B):
            grads_P = gradient(step) * len(run_id + str(step % 2))
            runs[run_id].add_gradient(grads_P)
            runs[run_id].publish(runs[run_id].prepare(ADAM))
            states[run_id], _ = adamw(states[run_id], grads_P, ADAM, SpareState())
    for run_id in (A, B):
        for own, alone in zip(vectors(runs[run_id].state), vectors(states[run_id]), strict=True):
            assert torch.equal(own, alone)


def test_memory_of_replaced_states_is_used_again() -> None:
    runs, seen = runs_in(torch.bfloat16), list[int]()
    runs.create(A, SPEC, 0)
    for step in range(6):
        runs[A].add_gradient(gradient(step))
        runs[A].publish(runs[A].prepare(ADAM))
        seen.append(runs[A].state.params_P.data_ptr())
    assert len(set(seen)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_saved_or_exported_is_never_written_into(dtype: torch.dtype) -> None:
    """In fp32 a slot serves the very vector that the update made."""
    runs, kept = runs_in(dtype), list[tuple[torch.Tensor, torch.Tensor]]()
    runs.create(A, SPEC, 0)
    for step in range(8):
        runs[A].add_gradient(gradient(step))
        runs[A].publish(runs[A].prepare(ADAM))
        shared = [runs[A].weights.flat_P]
        if step % 3 == 0:
            shared += vectors(runs.snapshot(A).state)
        kept += [(vector, vector.clone()) for vector in shared]
    assert all(torch.equal(vector, copy) for vector, copy in kept)
