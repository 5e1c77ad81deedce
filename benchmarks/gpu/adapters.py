"""What do 1, 64 and 512 distinct adapters in one decode batch cost over the bare base?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.bench import Bench, MadeAdapters, make_bench, peak_gib, prompts
from benchmarks.gpu.decode import generate
from benchmarks.gpu.scale import Scale
from openmint.types import LoraSpec

TITLE = "Distinct adapters in one decode batch"
MEASURED = (
    "Adapters (rank 8 at full size) on all layers but the output layer, distinct values each, "
    "drawn on the device and resident before the clock starts; sequence i uses adapter i modulo "
    "their number. Greedy; counted are the steps in which all sequences decode. `alone` repeats "
    "some sequences one at a time: how far the log-probability of the first token differs."
)
NUM_ALONE = 4


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    size = scale.adapters
    spec = LoraSpec(size.rank, train_unembed=False)
    bench = make_bench(scale, partial(MadeAdapters, spec))
    for batch, counts in size.batches.items():
        plain: float | None = None
        for count in counts:
            step, gap = measure(bench, scale, batch, count)
            plain = step if plain is None else plain
            yield {
                "table": "adapters",
                "sequences": batch,
                "distinct adapters": count,
                "ms a step": 1000 * step,
                "tokens/s": batch / step,
                "over the bare base": step / plain,
                "alone: largest gap": gap,
                "peak memory, GiB": peak_gib(scale.device),
            }


def measure(bench: Bench, scale: Scale, batch: int, count: int) -> tuple[float, float]:
    """Median seconds of a step, and the largest gap to sequences that ran alone."""
    size = scale.adapters
    digests = [MadeAdapters.digest(1 + i % count) if count else None for i in range(batch)]
    laps, gap = [], 0.0
    for lap in range(scale.repeats + 1):
        tokens = prompts(batch, size.tokens_in, bench.base.vocab_size, seed=1000 * count + lap)
        log, results = generate(bench, tokens, size.tokens_out, digests)
        seconds, drawn = log.decode
        laps.append(seconds / (drawn / batch))
        if lap == 0:
            for i in range(0, batch, max(1, batch // NUM_ALONE)):
                _, (alone,) = generate(bench, tokens[i : i + 1], 1, digests[i : i + 1])
                pair = results[i].sequences[0].logprobs_N[0], alone.sequences[0].logprobs_N[0]
                gap = max(gap, float(np.abs(pair[0] - pair[1])))
    return statistics.median(laps[1:]), gap
