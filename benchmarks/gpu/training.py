"""How much of the device's arithmetic does a training step use, for one policy and for several?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.bench import (
    Bench,
    make_bench,
    peak_gib,
    prompts,
    stored,
    synchronize,
)
from benchmarks.gpu.peaks import data_sheet, measured, share
from benchmarks.gpu.scale import Scale
from benchmarks.in_process import TENANT, next_tokens
from openmint.models.loader import DTYPES
from openmint.scheduler.work import OptimWork, TrainWork
from openmint.types import AdamParams, LoraSpec, LossSpec, RunId

TITLE = "Training step"
MEASURED = (
    "Forward and backward of one step of packed sequences through scheduler and engine, adapters "
    "on all layers but the output layer; with several policies each micro-batch holds data of "
    "more than one. FLOPs that the step needs: 4 a token and base weight (LoRA wants no gradient "
    "of the base), 6 a token and adapter weight, causal attention forward and backward. MFU is "
    "their rate over the data sheet's dense bf16 rate, and over that of a bare matrix product "
    "here. The optimizer step is timed apart."
)


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    sheet = data_sheet(scale.device)
    bare = measured(scale.device, DTYPES[scale.dtype])
    yield {
        "table": "this device",
        "bare matrix product, TFLOP/s": bare.flops / 1e12,
        "bare copy, GB/s": bare.bytes_per_second / 1e9,
        "data sheet, TFLOP/s": sheet.flops / 1e12 if sheet else None,
        "data sheet, GB/s": sheet.bytes_per_second / 1e9 if sheet else None,
    }
    with TemporaryDirectory() as folder:
        bench = make_bench(scale, stored(Path(folder)), kv_cache_bytes=2**20)
        for num_policies in scale.training.policies:
            row = measure(bench, scale, num_policies)
            flops = row.pop("flops")
            yield {
                "table": "training",
                **row,
                "TFLOP/s": flops / 1e12,
                "MFU": share(flops, sheet.flops if sheet else None),
                "of the bare product": flops / bare.flops,
                "peak memory, GiB": peak_gib(scale.device),
            }


def measure(bench: Bench, scale: Scale, num_policies: int) -> dict[str, Any]:
    size, spec = scale.training, LoraSpec(scale.rank, train_unembed=False)
    names = [f"{num_policies}-{i}" for i in range(num_policies)]
    runs = [bench.make_run(name, spec, i) for i, name in enumerate(names)]
    tokens = prompts(size.sequences, size.length + 1, bench.base.vocab_size, seed=0)
    parts = [tuple(map(next_tokens, tokens[i::num_policies])) for i in range(num_policies)]
    works = [
        TrainWork(run_id, TENANT, part, LossSpec("cross_entropy"), False)
        for run_id, part in zip(runs, parts, strict=True)
    ]
    laps = [lap(bench, scale, works, runs) for _ in range(scale.repeats + 2)][2:]
    seconds = statistics.median(lap["seconds"] for lap in laps)
    num_tokens = size.sequences * size.length
    needed = num_tokens * flops_per_token(
        bench, scale, bench.engine.runs[runs[0]].layout.num_params
    )
    for run_id in runs:
        bench.engine.drop_run(run_id)
    return {
        "policies": num_policies,
        "tokens": num_tokens,
        "seconds": seconds,
        "fastest": min(lap["seconds"] for lap in laps),
        "slowest": max(lap["seconds"] for lap in laps),
        "tokens/s": num_tokens / seconds,
        "optimizer, ms": 1000 * statistics.median(lap["optimizer"] for lap in laps),
        "loss per token, last": laps[-1]["loss"] / num_tokens,
        "flops": needed / seconds,
    }


def lap(
    bench: Bench, scale: Scale, works: Sequence[TrainWork], runs: Sequence[RunId]
) -> dict[str, float]:
    """One step of all policies, then their updates."""
    synchronize(scale.device)
    started_at = time.perf_counter()
    ids = [bench.submit(work) for work in works]
    for _ in bench.steps():
        pass
    synchronize(scale.device)
    trained_at = time.perf_counter()
    loss = sum(bench.result(work_id).metrics["loss:sum"] for work_id in ids)
    for run_id in runs:
        bench.do(OptimWork(run_id, TENANT, AdamParams()))
    synchronize(scale.device)
    ended_at = time.perf_counter()
    return {"seconds": trained_at - started_at, "optimizer": ended_at - trained_at, "loss": loss}


def flops_per_token(bench: Bench, scale: Scale, num_adapter_params: int) -> float:
    shape, length = scale.shape, scale.training.length
    base = sum(x.num_in * x.num_out for x in bench.model.linears)
    base += shape["vocab_size"] * shape["hidden_size"]
    heads = shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    return 4.0 * base + 6.0 * num_adapter_params + 6.0 * length * heads
