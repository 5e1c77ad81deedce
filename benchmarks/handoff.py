"""How long from trained weights to a first token of theirs, and what do eight policies weigh?

Through the unmodified Tinker SDK against a real service: `python -m benchmarks handoff`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tinker
from tinker import types

from benchmarks.arms.protocol import versions
from benchmarks.family import Family
from benchmarks.house import Line, Report, Spread, table, verdict
from benchmarks.processes import BASES, Stage
from tests.servers import running_server

NUM_POLICIES = 8
MOST_EXTRA_SECONDS, MOST_GIB = 0.020, 3e9 / 2**30
MEASURED = (
    "SmolLM2-135M-Instruct, rank 8 on all targets. Warm: one token after a new prompt of 32, on a "
    "sampler that has answered before. Handed over: an update, then "
    "`save_weights_and_get_sampling_client`, then the same of the new sampler. Memory: resident "
    "memory of all processes, client included, after eight policies trained a step at once "
    "(8 examples of 63 tokens each)."
)
PACKAGES = ("torch", "transformers", "tinker")


def prompt(seed: int, length: int = 32) -> types.ModelInput:
    tokens = np.random.default_rng(seed).integers(100, 40_000, length)
    return types.ModelInput.from_ints(tokens.tolist())


def data(seed: int) -> list[types.Datum]:
    rows = np.random.default_rng(seed).integers(100, 40_000, (8, 64))
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:].tolist(), "weights": [1.0] * 63},
        )
        for row in rows
    ]


def first_token_seconds(sampler: tinker.SamplingClient, seed: int) -> float:
    one = types.SamplingParams(max_tokens=1)
    started_at = time.monotonic()
    sampler.sample(prompt(seed), 1, one).result()
    return time.monotonic() - started_at


def one_handoff(run: tinker.TrainingClient, seed: int) -> dict[str, float]:
    """Seconds of a warm token, of the save's reply, and of the first token after it."""
    old = run.save_weights_and_get_sampling_client().result()
    first_token_seconds(old, seed)
    figures = {"warm token": first_token_seconds(old, seed + 1)}
    run.forward_backward(data(seed), "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=1e-4)).result()
    started_at = time.monotonic()
    new = run.save_weights_and_get_sampling_client().result()
    figures["save, until its reply"] = time.monotonic() - started_at
    figures["first token of new weights"] = first_token_seconds(new, seed + 2)
    figures["above a warm token"] = figures["first token of new weights"] - figures["warm token"]
    return figures


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: the service brings its own processes."""
    with (
        tempfile.TemporaryDirectory() as root,
        running_server(Path(root), bases_from=BASES) as server,
        tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service,
    ):
        runs = [
            service.create_lora_training_client(server.base, rank=8, seed=i).result()
            for i in range(NUM_POLICIES)
        ]
        found = [one_handoff(runs[0], 10 * i) for i in range(repeats + 1)][1:]
        train_together(runs)
        return report(found, Family(server.process.pid).resident_bytes() / 2**30)


def train_together(runs: Sequence[tinker.TrainingClient]) -> None:
    """Two steps of all policies, every request under way at once."""
    for _ in range(2):
        passed = [run.forward_backward(data(i), "cross_entropy") for i, run in enumerate(runs)]
        updated = [run.optim_step(types.AdamParams()) for run in runs]
        for future in (*passed, *updated):
            future.result()


def report(found: Sequence[dict[str, float]], gib: float) -> Report:
    spreads = {name: Spread.of([1000 * each[name] for each in found]) for name in found[0]}
    extra = spreads["above a warm token"]
    lines = [
        Line(
            "handed over: first token above a warm request",
            f"≤ {1000 * MOST_EXTRA_SECONDS:g} ms",
            extra.show(" ms"),
            verdict(extra.median, at_most=1000 * MOST_EXTRA_SECONDS),
        ),
        Line(
            f"memory of all processes, {NUM_POLICIES} policies training",
            "≤ 3 GB",
            f"{gib * 2**30 / 1e9:.2f} GB",
            verdict(gib, at_most=MOST_GIB),
        ),
    ]
    rows = [[name, spread.show(" ms")] for name, spread in spreads.items()]
    return Report(
        question="handoff",
        title="From trained weights to their first token; memory of eight policies",
        measured=MEASURED,
        tables=[table([["what", "median (range)"], *rows])],
        lines=lines,
        limits=["Client and service share the cores."],
        data={"repeats": list(found), "memory_gib": gib},
        versions={"service": versions(PACKAGES)},
    )
