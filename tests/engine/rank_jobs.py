"""What `test_ranks.py` has every rank do, and one rank alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openmint.errors import EngineFailed, NonFinite
from openmint.layers.gathered import GatheredLinear
from openmint.layers.linear import LoraLinear
from openmint.layers.ranks import UNDIVIDED, Division, Ranks
from openmint.scheduler.work import (
    ExportRun,
    OptimWork,
    RestoreRun,
    SampleWork,
    SaveRun,
    TrainResult,
)
from openmint.types import (
    AdamParams,
    Digest,
    FloatArray,
    LoraSpec,
    RunId,
    SamplingParams,
    Tenant,
)
from tests.engine.test_replay import policy_datum, sampled, trained
from tests.ranks import division
from tests.workbench import Workbench, prompt_of, train_work

TENANT = Tenant("t")
SPECS = {
    "one": LoraSpec(4),
    "two": LoraSpec(8, alpha=16.0, train_attn=False),
    "three": LoraSpec(3, train_mlp=False, train_unembed=False),
}
LENGTHS = (23, 11, 1, 17)
ADAM = AdamParams(learning_rate=1e-2, eps=1e-5, grad_clip_norm=0.5)


@dataclass(frozen=True)
class Outcome:
    """Of a session on one rank; all vectors are whole."""

    results: list[TrainResult]
    gradients: list[Tensor]
    grad_norms: list[float]
    updated: list[Tensor]
    digests: list[Digest]
    tokens: list[list[int]]
    logprobs: list[FloatArray]
    own_weights: int
    """Values of its blocks' layers that this rank holds."""


def session(
    folder: Path, store: Path, parts: Division = UNDIVIDED, dtype: str = "float32"
) -> Outcome:
    """Three policies train in one batch, are updated, exported, saved, restored and sampled."""
    bench = Workbench(folder, store, division=parts, page_tokens=4, dtype=dtype)
    ids = [bench.trained(name, spec, i, 0.1) for i, (name, spec) in enumerate(SPECS.items())]
    works = [train_work(run, "cross_entropy", LENGTHS, i) for i, run in enumerate(ids)]
    works.append(train_work(ids[0], "cross_entropy", LENGTHS, 9, forward_only=True))
    sent = [bench.submit(work) for work in works]
    bench.run()
    runs = [bench.engine.runs[run] for run in ids]
    gradients = [run.shard.gather(run.grads_P).clone() for run in runs]
    norms = [_update(bench, run) for run in ids]
    digests = [bench.do(ExportRun(run, TENANT, keep_resident=True)).digest for run in ids]
    digests.append(bench.do(SaveRun(ids[0], TENANT)).digest)
    again = RunId("again")
    bench.do(RestoreRun(again, TENANT, digests[-1], "training", True))
    bench.do(train_work(again, "ppo", LENGTHS, 7))
    bench.do(train_work(again, "ppo", (5,), 8))  # one datum: the others of many ranks have none
    norms.append(_update(bench, again))
    updated = [*runs, bench.engine.runs[again]]
    drawn = _drawn(bench, [*digests[:3], None])
    return Outcome(
        results=[bench.result(work) for work in sent],
        gradients=gradients,
        grad_norms=norms,
        updated=[run.share_state().params_P for run in updated],
        digests=digests,
        tokens=[tokens for tokens, _ in drawn],
        logprobs=[logprobs for _, logprobs in drawn],
        own_weights=sum(_held(linear) for linear in bench.model.linears),
    )


def _held(linear: LoraLinear) -> int:
    if isinstance(linear, GatheredLinear):
        assert not len(linear.weight_OI), "it is whole only while it computes"
        return linear.own_RI.numel()
    return linear.num_in * linear.num_out


def _update(bench: Workbench, run: RunId) -> float:
    norm: float = bench.do(OptimWork(run, TENANT, ADAM)).metrics["grad_norm:max"]
    return norm


def _drawn(
    bench: Workbench, revisions: Sequence[Digest | None]
) -> list[tuple[list[int], FloatArray]]:
    """Together, each greedily and by a seed."""
    prompt, heats = prompt_of(13, 5), (0.0, 1.0)
    works = [
        bench.submit(SampleWork(TENANT, revision, prompt, SamplingParams(9, heat, seed=3)))
        for revision in revisions
        for heat in heats
    ]
    bench.run()
    drawn = [bench.result(work).sequences[0] for work in works]
    return [(each.tokens_N.tolist(), each.logprobs_N) for each in drawn]


def sessions(
    ranks: Ranks, folder: Path, forms: tuple[str, ...], stores: Path, dtype: str = "float32"
) -> dict[str, Outcome]:
    """One for each form of division."""
    return {
        form: session(folder, stores / f"{form}-{ranks.rank}", division(ranks, form), dtype)
        for form in forms
    }


def all_sessions(
    ranks: Ranks, divided: Mapping[Path, tuple[str, ...]], stores: Path
) -> dict[Path, dict[str, Outcome]]:
    """Of every base in each of its forms."""
    return {
        folder: sessions(ranks, folder, forms, stores / folder.name)
        for folder, forms in divided.items()
    }


def replay(
    folder: Path, store: Path, parts: Division = UNDIVIDED
) -> tuple[bytes, dict[str, float], Tensor]:
    """What sampling recorded, what repeating it in another policy's training said, and the gradient
    of that."""
    bench = Workbench(folder, store, division=parts, page_tokens=4)
    drawn = sampled(bench, bench.revision("one", SPECS["one"], 0, 0.1), 1)
    run_id = bench.trained("other", SPECS["one"], 5, 0.2)
    own = policy_datum(drawn, is_forced=False)
    result = trained(bench, run_id, policy_datum(drawn, is_forced=True), own)
    run = bench.engine.runs[run_id]
    return drawn.sequences[0].routes, result.metrics, run.shard.gather(run.grads_P)


def replays(
    ranks: Ranks, folder: Path, forms: tuple[str, ...], stores: Path
) -> dict[str, tuple[bytes, dict[str, float], Tensor]]:
    """One for each form of division."""
    return {
        form: replay(folder, stores / f"{form}-{ranks.rank}", division(ranks, form))
        for form in forms
    }


def unequal(ranks: Ranks, folder: Path, stores: Path) -> str:
    """What an export says once one rank's copy of something common has changed."""
    bench = Workbench(folder, stores / str(ranks.rank), division=division(ranks, "tensor"))
    run_id = bench.trained("one", SPECS["one"], 0)
    run = bench.engine.runs[run_id]
    path = "model.layers.1.self_attn.k_proj"
    run.weights.views[path][0][2, 5] += 1e-7 * ranks.rank
    try:
        bench.do(ExportRun(run_id, TENANT, keep_resident=True))
    except EngineFailed as error:
        return str(error)
    return "nothing"


def overflow(ranks: Ranks, folder: Path, stores: Path) -> tuple[str, float]:
    """What a gradient that isn't finite on one rank alone comes to, and what is left of it."""
    bench = Workbench(folder, stores / str(ranks.rank), division=division(ranks, "tensor"))
    run_id = bench.trained("one", SPECS["one"], 0)
    weight_OI = bench.model.layers[1].feed_forward.down.weight_OI
    whole = bench.engine.close_train

    def close(work_id: int):  # type: ignore[no-untyped-def]
        if ranks.rank == 1:  # B of this target is cut, so no other rank sees it
            work = bench.engine._open[work_id]
            work.run.layout.views(work.lane_gradient(0))["model.layers.1.mlp.up_proj"][1][0] = (
                torch.inf
            )
        return whole(work_id)

    bench.engine.close_train = close  # type: ignore[method-assign]
    assert weight_OI.shape[1] == 24
    try:
        bench.do(train_work(run_id, "cross_entropy", LENGTHS, 0))
    except NonFinite as error:
        left = float(bench.engine.runs[run_id].grads_P.abs().sum())
        return type(error).__name__, left
    return "nothing", 0.0
