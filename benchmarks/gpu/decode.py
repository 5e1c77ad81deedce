"""How near does a decode step come to the memory's speed, at 1 to 128 sequences?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.arms.steps import StepLog
from benchmarks.gpu.bench import Bench, make_bench, peak_gib, prompts, stored
from benchmarks.gpu.peaks import data_sheet, measured, share
from benchmarks.gpu.scale import Scale
from benchmarks.in_process import TENANT
from openmint.models.loader import DTYPES
from openmint.scheduler.work import SampleResult, SampleWork
from openmint.types import Digest, IntArray, SamplingParams

TITLE = "Decode against bandwidth"
MEASURED = (
    "Random prompts, greedy, no token ends a sequence, the bare base, through scheduler and "
    "engine. Counted are the steps in which all sequences decode. A step must read every weight "
    "once and the keys and values of all its sequences; their bytes over the step's time are set "
    "beside the data sheet's bandwidth and beside that of a bare copy here."
)


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    sheet = data_sheet(scale.device)
    bare = measured(scale.device, DTYPES[scale.dtype])
    size = scale.decoding
    with TemporaryDirectory() as folder:
        bench = make_bench(scale, stored(Path(folder)))
        for batch in size.batches:
            tokens = prompts(batch * (scale.repeats + 1), size.tokens_in, bench.base.vocab_size, 0)
            parts = [tokens[i :: scale.repeats + 1] for i in range(scale.repeats + 1)]
            laps = [generate(bench, part, size.tokens_out)[0].decode for part in parts][1:]
            step = statistics.median(seconds / (drawn / batch) for seconds, drawn in laps)
            num_cached = size.tokens_in + size.tokens_out / 2
            moved = bench.base.weight_bytes + batch * num_cached * cache_bytes(scale)
            yield {
                "table": "decode",
                "sequences": batch,
                "ms a step": 1000 * step,
                "tokens/s": batch / step,
                "GB/s": moved / step / 1e9,
                "of the data sheet": share(moved / step, sheet and sheet.bytes_per_second),
                "of a bare copy": moved / step / bare.bytes_per_second,
                "peak memory, GiB": peak_gib(scale.device),
            }


def generate(
    bench: Bench,
    prompts_ST: IntArray,
    tokens_out: int,
    revisions: Sequence[Digest | None] | None = None,
) -> tuple[StepLog, list[SampleResult]]:
    """All prompts at once, each with its own revision; when each step ended, and the results."""
    params = SamplingParams(max_tokens=tokens_out, temperature=0.0)
    revisions = revisions or [None] * len(prompts_ST)
    log, drawn = StepLog(len(prompts_ST)), bench.scheduler.stats().generated_tokens
    works = [
        bench.submit(SampleWork(TENANT, revision, row_T, params))
        for row_T, revision in zip(prompts_ST, revisions, strict=True)
    ]
    for _ in bench.steps():
        before, drawn = drawn, bench.scheduler.stats().generated_tokens
        log.step(drawn - before)
    return log, [bench.result(work_id) for work_id in works]


def cache_bytes(scale: Scale) -> int:
    """Keys and values of one token, all layers."""
    shape = scale.shape
    values = shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return 2 * int(values) * DTYPES[scale.dtype].itemsize
