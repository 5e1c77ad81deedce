"""How far is training from what sampled, with recorded routes and with its own?

`python -m benchmarks replay`. Random bases of a middling size; their routers are undecided more
often than trained ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from benchmarks.arms.ours import Service, service
from benchmarks.arms.protocol import versions
from benchmarks.arms.steps import token_rows
from benchmarks.house import Line, Report, number, table, verdict
from benchmarks.in_process import TENANT
from benchmarks.mixtures import EXPERTS, LATENTS, base_folder
from benchmarks.processes import THREADS, Stage
from openmint.scheduler.work import (
    CreateRun,
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
    RecordedRoutes,
    RunId,
    SamplingParams,
)

SEQUENCES, TOKENS_IN, TOKENS_OUT = 16, 64, 128
NUM_KEYS = 48
LEARNING_RATE = 1e-3
INDEXED = {"index_topk": NUM_KEYS, "index_n_heads": 16, "index_head_dim": 64}
BASES_OF = {
    "experts": ("mixture-0.7b", "Qwen3MoeConfig", EXPERTS),
    "latents and experts": ("latent", "DeepseekV3Config", LATENTS),
    "chosen keys, latents and experts": ("sparse", "DeepseekV32Config", {**LATENTS, **INDEXED}),
}
WHEN = ("same weights", "one update later")
SPEC, RUN = LoraSpec(8, train_unembed=False), RunId("replay")
TITLE = "Replay: the distance of training from sampling"
MEASURED = (
    f"{SEQUENCES} sequences of {TOKENS_IN} random tokens and {TOKENS_OUT} drawn ones at "
    "temperature 1, bf16, by an adapter of rank 8 after two updates; then a forward pass of the "
    "trainer over the same sequences, by the routes that were recorded and by its own: with the "
    f"weights that drew them, and after one more update at a rate of {LEARNING_RATE}. The gap is "
    "the mean of |log-probability of the trainer - of the sampler| over drawn tokens; out of route "
    "is the share of experts that are not in the record. The base with an indexer chooses "
    f"{NUM_KEYS} keys a query. Bytes are those of the records as they are kept."
)
LIMITS = (
    "After an update part of the gap is what the update was for; replay leaves that part.",
    "Random routers decide by small differences: more routes flip than in a trained base.",
    "Random indexers keep few keys from one token to the next: their records are larger.",
)


@dataclass(frozen=True)
class Distance:
    """Of one pass."""

    gap: float
    out_of_route: float


@dataclass(frozen=True)
class Found:
    bytes_per_token: float
    distances: Mapping[tuple[str, bool], Distance]
    """By when, and whether routes were repeated."""


def measure(base: str) -> Found:
    bench = service(base, kv_cache_bytes=1 << 28)
    bench.do(CreateRun(RUN, TENANT, SPEC, seed=0))
    for seed in range(2):
        _update(bench, seed)
    revision = bench.do(ExportRun(RUN, TENANT, keep_resident=True)).digest
    params = SamplingParams(max_tokens=TOKENS_OUT, temperature=1.0, seed=1)
    prompts = token_rows(SEQUENCES, TOKENS_IN, seed=7)
    ids = [
        bench.submit(SampleWork(TENANT, revision, row, replace(params, seed=i), routes=True))
        for i, row in enumerate(prompts)
    ]
    for _ in bench.steps():
        pass
    data = [_datum(row, bench.result(i)) for row, i in zip(prompts, ids, strict=True)]
    distances = {}
    for when in WHEN:
        if when != WHEN[0]:
            _update(bench, 9)
        for is_forced in (True, False):
            distances[when, is_forced] = _distance(bench, data, is_forced)
    num_bytes = [len(d.routes.record) / d.routes.num_tokens for d in data if d.routes]
    return Found(float(np.mean(num_bytes)), distances)


def _update(bench: Service, seed: int) -> None:
    rows = token_rows(4, 65, seed=100 + seed)
    data = [
        Datum(row[:-1], {"target_tokens": row[1:], "weights": np.ones(64, np.float32)})
        for row in rows
    ]
    bench.do(TrainWork(RUN, TENANT, tuple(data), LossSpec("cross_entropy"), False))
    bench.do(OptimWork(RUN, TENANT, AdamParams(learning_rate=LEARNING_RATE)))


def _datum(prompt_T: IntArray, result: SampleResult) -> Datum:
    (sequence,) = result.sequences
    tokens_N = np.concatenate([prompt_T, sequence.tokens_N])
    before = np.zeros(len(prompt_T) - 1, np.float32)
    inputs = {
        "target_tokens": tokens_N[1:],
        "logprobs": np.concatenate([before, sequence.logprobs_N]),
        "advantages": np.concatenate([before, np.ones(len(sequence.tokens_N), np.float32)]),
    }
    routes = RecordedRoutes(sequence.routes, len(tokens_N) - 1)
    return Datum(tokens_N[:-1], inputs, routes)


def _distance(bench: Service, data: Sequence[Datum], is_forced: bool) -> Distance:
    given = tuple(
        replace(d, routes=replace(d.routes, is_forced=is_forced)) for d in data if d.routes
    )
    loss = LossSpec("importance_sampling")
    result: TrainResult = bench.do(TrainWork(RUN, TENANT, given, loss, forward_only=True))
    gaps = [
        np.abs(ours - d.inputs["logprobs"])[d.inputs["advantages"] > 0]
        for ours, d in zip(result.logprobs, given, strict=True)
    ]
    gap = float(np.mean(np.concatenate(gaps)))
    return Distance(gap, result.metrics["out_of_route_ratio:mean"])


def ask(stage: Stage, repeats: int) -> Report:
    """Nothing is timed, and all is seeded, so there are no repeats."""
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # which `service` goes by
    found = {name: measure(base_folder(*which)) for name, which in BASES_OF.items()}
    return report(found)


def report(found: Mapping[str, Found]) -> Report:
    rows: list[list[str]] = []
    lines = []
    for name, each in found.items():
        for when in WHEN:
            by_record, own = each.distances[when, True], each.distances[when, False]
            rows.append(
                [
                    *(name, when, f"{each.bytes_per_token:,.0f}"),
                    *(f"{own.gap:.5f}", f"{by_record.gap:.5f}"),
                    *(f"{own.out_of_route:.4f}", f"{by_record.out_of_route:.4f}"),
                ]
            )
            work = f"{name}, {when}: log-probability gap by own routes / by recorded ones"
            factor = own.gap / by_record.gap if by_record.gap else 1.0
            figure = f"{number(factor)}x" if by_record.gap else "no gap either way"
            lines.append(Line(work, "≥ 1", figure, verdict(factor, at_least=1.0)))
    head = ["base", "when", "bytes a token", "gap, own", "gap, recorded"]
    return Report(
        question="replay",
        title=TITLE,
        measured=MEASURED,
        tables=[table([[*head, "out of route, own", "recorded"], *rows])],
        lines=lines,
        limits=LIMITS,
        data={
            name: {
                f"{when}, {'recorded' if is_forced else 'own'}": asdict(distance)
                for (when, is_forced), distance in each.distances.items()
            }
            for name, each in found.items()
        },
        versions={"ours": versions(("torch", "transformers", "numpy"))},
    )
