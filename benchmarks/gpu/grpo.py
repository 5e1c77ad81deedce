"""Do several policies that learn by GRPO at once finish sooner than one after another?"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.gpu.bench import (
    Bench,
    make_bench,
    peak_gib,
    prompts,
    stored,
    synchronize,
)
from benchmarks.gpu.scale import Scale
from benchmarks.in_process import TENANT
from openmint.scheduler.work import (
    ExportRun,
    OptimWork,
    SampleResult,
    SampleWork,
    TrainResult,
    TrainWork,
)
from openmint.types import (
    AdamParams,
    Datum,
    IntArray,
    LoraSpec,
    LossSpec,
    SampledSequence,
    SamplingParams,
)

TITLE = "Concurrent GRPO"
MEASURED = (
    "Each policy runs the same loop as the others on prompts of its own: export, sample groups to "
    "a fixed number of tokens (no token ends a sequence), reward, train with importance_sampling, "
    "update. First every policy runs alone; their times added are `one after another`. Then N "
    "policies run at once in the same engine, each going on as soon as its own results are there. "
    "They sample the same budget anew, and train on the rollouts that they drew alone, so that "
    "losses and weights can be compared with the solo run: a last bit that differs in bf16 would "
    "else draw another token and make another experiment. `same tokens` says how often the new "
    "draw was the old one."
)
LEARNING_RATE = 1e-4

Wait = Generator[list[int], None, None]
"""Yields the works that must end before it can go on."""


@dataclass
class Record:
    """What one policy did in one run."""

    rollouts: list[list[SampledSequence]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    params_P: Tensor | None = None
    ended_at: float = 0.0
    num_tokens: int = 0
    num_same: int = 0


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        bench = make_bench(scale, stored(Path(folder)))
        run_together(bench, scale, [99], {})  # compiles and captures what all need
        alone: dict[int, Record] = {}
        seconds: dict[int, float] = {}
        for policy in range(max(scale.grpo.policies)):
            seconds[policy], (alone[policy],) = run_together(bench, scale, [policy], {})
        for num_policies in scale.grpo.policies:
            policies = list(range(num_policies))
            makespan, records = run_together(bench, scale, policies, alone)
            after_another = sum(seconds[policy] for policy in policies)
            yield {
                "table": "makespan",
                "policies": num_policies,
                "one after another, s": after_another,
                "at once, s": makespan,
                "speedup": after_another / makespan,
                "first finished, s": min(record.ended_at for record in records),
                "peak memory, GiB": peak_gib(scale.device),
            }
            yield equality(num_policies, records, [alone[policy] for policy in policies])


def equality(num_policies: int, records: list[Record], alone: list[Record]) -> dict[str, Any]:
    """How far the policies came from what they were alone."""
    losses = [
        abs(ours - theirs) / max(1e-9, abs(theirs))
        for record, solo in zip(records, alone, strict=True)
        for ours, theirs in zip(record.losses, solo.losses, strict=True)
    ]
    moved = [relative(r.params_P, s.params_P) for r, s in zip(records, alone, strict=True)]
    return {
        "table": "equality with the solo runs",
        "policies": num_policies,
        "loss, largest relative gap": max(losses),
        "weights, largest relative gap": max(moved),
        "same tokens": sum(r.num_same for r in records) / sum(r.num_tokens for r in records),
    }


def relative(ours_P: Tensor | None, theirs_P: Tensor | None) -> float:
    assert ours_P is not None and theirs_P is not None
    return float((ours_P - theirs_P).norm() / theirs_P.norm())


def run_together(
    bench: Bench, scale: Scale, policies: Sequence[int], alone: dict[int, Record]
) -> tuple[float, list[Record]]:
    """Makespan, and what each policy did. Those with a solo record train on its rollouts."""
    records = {policy: Record() for policy in policies}
    loops = {
        policy: learn(bench, scale, policy, records[policy], alone.get(policy))
        for policy in policies
    }
    waiting: dict[int, list[int]] = {}
    synchronize(scale.device)
    started_at = time.perf_counter()

    def go_on(policy: int) -> None:
        try:
            waiting[policy] = next(loops[policy])
        except StopIteration:
            del waiting[policy]
            records[policy].ended_at = time.perf_counter() - started_at

    for policy in policies:
        waiting[policy] = []
        go_on(policy)
    while waiting:
        for _ in bench.steps():
            ready = [p for p, works in waiting.items() if all(map(bench.is_done, works))]
            if ready:
                break
        for policy in ready:
            go_on(policy)
    synchronize(scale.device)
    return time.perf_counter() - started_at, list(records.values())


def learn(bench: Bench, scale: Scale, policy: int, record: Record, solo: Record | None) -> Wait:
    """One policy's whole job."""
    size = scale.grpo
    spec = LoraSpec(scale.rank, train_unembed=False)
    run_id = bench.make_run(f"policy-{policy}", spec, seed=policy)
    vocab_size = bench.base.vocab_size
    for step in range(size.steps):
        export = bench.submit(ExportRun(run_id, TENANT, keep_resident=True))
        yield [export]
        revision = bench.result(export).digest
        rows_GT = prompts(size.groups, size.tokens_in, vocab_size, seed=1000 * policy + step)
        params = SamplingParams(max_tokens=size.tokens_out, seed=1 + step)
        works = [
            bench.submit(SampleWork(TENANT, revision, row_T, params, num_samples=size.group_size))
            for row_T in rows_GT
        ]
        yield works
        results: list[SampleResult] = [bench.result(work) for work in works]
        drawn = [sequence for result in results for sequence in result.sequences]
        kept = drawn if solo is None else solo.rollouts[step]
        note_rollouts(record, drawn, kept)
        data = grpo_data(rows_GT, kept, size.group_size)
        train = bench.submit(
            TrainWork(run_id, TENANT, data, LossSpec("importance_sampling"), False)
        )
        update = bench.submit(OptimWork(run_id, TENANT, AdamParams(learning_rate=LEARNING_RATE)))
        yield [train, update]
        trained: TrainResult = bench.result(train)
        record.losses.append(trained.metrics["loss:sum"])
        bench.result(update)
    record.params_P = bench.engine.runs[run_id].state.params_P
    bench.engine.drop_run(run_id)


def note_rollouts(
    record: Record, drawn: list[SampledSequence], kept: list[SampledSequence]
) -> None:
    record.rollouts.append(drawn)
    for ours, theirs in zip(drawn, kept, strict=True):
        record.num_tokens += len(ours.tokens_N)
        record.num_same += int((ours.tokens_N == theirs.tokens_N).sum())


def grpo_data(
    prompts_GT: IntArray, drawn: Sequence[SampledSequence], group_size: int
) -> tuple[Datum, ...]:
    """Whole sequences, weighted by how much better than their group's mean they are."""
    rewards_GK = np.array([reward(s.tokens_N) for s in drawn]).reshape(-1, group_size)
    spread_G1 = rewards_GK.std(axis=1, keepdims=True) + 1e-6
    advantages = ((rewards_GK - rewards_GK.mean(axis=1, keepdims=True)) / spread_G1).flatten()
    prompts_ST = np.repeat(prompts_GT, group_size, axis=0)
    triples = zip(prompts_ST, drawn, advantages, strict=True)
    return tuple(datum(prompt_T, s, float(advantage)) for prompt_T, s, advantage in triples)


def reward(tokens_N: IntArray) -> float:
    """The share of even tokens: cheap, and every group has a spread of it."""
    return float((tokens_N % 2 == 0).mean())


def datum(prompt_T: IntArray, sequence: SampledSequence, advantage: float) -> Datum:
    tokens = np.concatenate([prompt_T, sequence.tokens_N])
    num_prompt = len(prompt_T) - 1
    sampled = np.zeros(num_prompt, np.float32)
    return Datum(
        tokens[:-1],
        {
            "target_tokens": tokens[1:],
            "logprobs": np.concatenate([sampled, sequence.logprobs_N]),
            "advantages": np.concatenate([sampled, np.full_like(sequence.logprobs_N, advantage)]),
        },
    )
