"""How long until new weights answer: as an adapter, as a merged model in a new engine, or in place?

Four definitions, all from the same timings, as the answer depends on which one is meant.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

from benchmarks.gpu.base import named_tensors, save_folder
from benchmarks.gpu.bench import Bench, make_bench, peak_gib, prompts, seconds_of
from benchmarks.gpu.scale import Scale
from benchmarks.in_process import TENANT
from openmint.engine.formats import AdapterArchive
from openmint.layers.adapters import AdapterWeights
from openmint.scheduler.work import ExportRun
from openmint.store.folder_store import FolderStore
from openmint.types import Digest, FloatArray, IntArray, LoraSpec

TITLE = "Hand-over of new weights, three ways"
MEASURED = (
    "An adapter on all layers but the output layer goes from its training session to a sampler; "
    "one request at a time, greedy. `make`: what the trainer does first (export and durable write "
    "of the adapter; or merge, and write of the model where a file is needed). `load`: until the "
    "serving engine could take a request. Files are in the page cache. A: the adapter file into a "
    "slot of the resident engine, median of several. B1: the merged model into a new engine in a "
    "new process, from its start. B2: merged weights copied over those of a live engine, from "
    "device memory or from the file; its cache of prefixes would have to be dropped too. The "
    "engine of A and B2 has served before; B1's first request is its engine's first. What is "
    "compiled or captured on first use falls on that request; compiled kernels come from the "
    "disk's cache in all arms."
)
CURVE_TOKENS = (64, 512, 4096, 32_768)


@dataclass
class Arm:
    """Timings of one way to hand over, in seconds."""

    name: str
    num_bytes: int
    make: float
    load: float
    requests: list[float] = field(default_factory=list)
    """Of the first and of later ones."""
    logprobs_T: FloatArray | None = None
    """Of a fixed prompt, for parity."""

    @property
    def warm(self) -> float:
        return statistics.median(self.requests[1:])

    def by_definition(self) -> dict[str, float]:
        return {
            "load": self.load,
            "load + first request": self.load + self.requests[0],
            "load + one warm request": self.load + self.warm,
            f"load + {len(self.requests)} requests": self.load + sum(self.requests),
        }

    def until(self, num_tokens: int, tokens_a_request: int) -> float:
        """Make, load and so many tokens at the warm rate."""
        return self.make + self.load + num_tokens * self.warm / tokens_a_request


class TimedArchive(AdapterArchive):
    """Notes how long a revision took to read, check and move to the device."""

    load_seconds = 0.0

    def load_revision(self, revision: Digest) -> AdapterWeights:
        device = self._base.device
        self.load_seconds, weights = seconds_of(
            device, lambda: super(TimedArchive, self).load_revision(revision)
        )
        return weights


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    size = scale.handoff
    settings = {"kv_cache_bytes": min(2**31, scale.worker["kv_cache_bytes"])}
    with TemporaryDirectory() as root:
        blobs = FolderStore(Path(root) / "store")
        bench = make_bench(scale, partial(TimedArchive, blobs), **settings)
        adapter, weights = adapter_arm(bench, scale)
        arms = [adapter]
        yield arm_row(adapter)
        merge_seconds, merged = seconds_of(scale.device, lambda: merge(bench, weights))
        live = make_bench(scale, partial(TimedArchive, blobs), **settings)
        requests(live, scale, None, seed=7)  # it has served before
        arms.append(in_place(live, scale, merged, merge_seconds))
        yield arm_row(arms[-1])
        folder = Path(root) / "merged"
        config = Qwen3Config(**scale.shape)
        save_seconds, num_bytes = seconds_of(
            scale.device, lambda: save_folder(merged, config, folder)
        )
        merged.clear()
        made = merge_seconds + save_seconds
        arms.append(from_file(live, scale, folder, made))
        yield arm_row(arms[-1])
        arms.append(new_engine(scale, folder, num_bytes, made))
        yield arm_row(arms[-1])
    yield from comparisons(arms, size.tokens_out)
    yield {"table": "memory", "peak of the resident process, GiB": peak_gib(scale.device)}


def adapter_arm(bench: Bench, scale: Scale) -> tuple[Arm, AdapterWeights]:
    """Several new adapters, one after another; the last one's weights are what B merges."""
    spec, arms = LoraSpec(scale.rank, train_unembed=False), []
    requests(bench, scale, None, seed=7)
    for i in range(scale.handoff.handovers + 1):
        run_id = bench.make_run("policy", spec, seed=i)
        make, saved = seconds_of(
            scale.device,
            lambda: bench.do(ExportRun(run_id, TENANT, keep_resident=False)),  # noqa: B023
        )
        weights = bench.engine.runs[run_id].weights
        bench.engine.drop_run(run_id)
        arm = Arm("A: adapter", saved.size_bytes, make, 0.0)
        arm.requests = requests(bench, scale, saved.digest, seed=100 + i)
        arm.load = bench.archive.load_seconds
        arm.requests[0] -= arm.load
        arms.append(arm)
    counted = arms[1:]  # the first adapter of all compiles what later ones find
    last = counted[-1]
    last.make, last.load = (
        statistics.median(getattr(a, n) for a in counted) for n in ("make", "load")
    )
    last.requests = [
        statistics.median(times) for times in zip(*(a.requests for a in counted), strict=True)
    ]
    last.logprobs_T = prompt_logprobs(bench, scale, saved.digest)
    return last, weights


def requests(bench: Bench, scale: Scale, revision: Digest | None, seed: int) -> list[float]:
    """Seconds of some requests, one after another, each with a new prompt."""
    size = scale.handoff
    tokens = prompts(size.requests, size.tokens_in, scale.shape["vocab_size"], seed)
    return [
        seconds_of(scale.device, lambda: bench.sample(row_T, size.tokens_out, revision))[0]  # noqa: B023
        for row_T in tokens
    ]


def prompt_logprobs(bench: Bench, scale: Scale, revision: Digest | None) -> FloatArray:
    logprobs = bench.sample(
        parity_prompt(scale), 1, revision, prompt_logprobs=True
    ).prompt_logprobs_T
    assert logprobs is not None
    return logprobs[1:]


def parity_prompt(scale: Scale) -> IntArray:
    row_T: IntArray = prompts(1, 8 * scale.handoff.tokens_in, scale.shape["vocab_size"], seed=5)[0]
    return row_T


def merge(bench: Bench, weights: AdapterWeights) -> dict[str, Tensor]:
    """A second set of the base's tensors, `W + scaling * B @ A` where the adapter has them."""
    merged = {name: tensor.clone() for name, tensor in named_tensors(bench.model).items()}
    for path, (a_RI, b_RO) in weights.views.items():
        weight_OI = merged[f"{path}.weight"]
        update_OI = b_RO.t().float() @ a_RI.float() * weights.spec.scaling
        merged[f"{path}.weight"] = (weight_OI.float() + update_OI).to(weight_OI.dtype)
    return merged


def overwrite(bench: Bench, tensors: dict[str, Tensor]) -> None:
    """Put these values where the live engine reads its own."""
    for name, place in named_tensors(bench.model).items():
        place.copy_(tensors[name])


def in_place(live: Bench, scale: Scale, merged: dict[str, Tensor], merge_seconds: float) -> Arm:
    num_bytes = sum(tensor.nbytes for tensor in merged.values())
    load, _ = seconds_of(scale.device, lambda: overwrite(live, merged))
    arm = Arm("B2: merge, in place from device memory", num_bytes, merge_seconds, load)
    arm.requests = requests(live, scale, None, seed=8)
    arm.logprobs_T = prompt_logprobs(live, scale, None)
    return arm


def from_file(live: Bench, scale: Scale, folder: Path, made: float) -> Arm:
    path = folder / "model.safetensors"
    load, _ = seconds_of(
        scale.device, lambda: overwrite(live, load_file(path, device=scale.device))
    )
    arm = Arm("B2: merge, in place from the file", path.stat().st_size, made, load)
    arm.requests = requests(live, scale, None, seed=9)
    return arm


def new_engine(scale: Scale, folder: Path, num_bytes: int, made: float) -> Arm:
    command = [sys.executable, "-m", "benchmarks.gpu.new_engine", scale.name, str(folder)]
    started_at = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the new engine did not start: see above"
        load = time.perf_counter() - started_at
        answer = json.loads(process.stdout.readline())
    logprobs_T = np.array(answer["logprobs"], np.float32)
    return Arm("B1: merge, new engine", num_bytes, made, load, answer["requests"], logprobs_T)


def arm_row(arm: Arm) -> dict[str, Any]:
    return {
        "table": "arms",
        "arm": arm.name,
        "MB": arm.num_bytes / 1e6,
        "make, s": arm.make,
        "load, s": arm.load,
        "first request, s": arm.requests[0],
        "warm request, s": arm.warm,
    }


def comparisons(arms: list[Arm], tokens_out: int) -> Iterator[dict[str, Any]]:
    adapter = arms[0]
    for arm in arms[1:]:
        pairs = zip(arm.by_definition().items(), adapter.by_definition().values(), strict=True)
        for (definition, theirs), ours in pairs:
            yield {
                "table": "four definitions",
                "definition": definition,
                "arm": arm.name,
                "adapter, s": ours,
                "arm, s": theirs,
                "ratio": theirs / ours,
                "ratio, make included": (arm.make + theirs) / (adapter.make + ours),
            }
    for arm in arms[1:]:
        for num_tokens in CURVE_TOKENS:
            ratio = arm.until(num_tokens, tokens_out) / adapter.until(num_tokens, tokens_out)
            yield {
                "table": "ratio until T tokens, make + load + T at the warm rate",
                "arm": arm.name,
                "T": num_tokens,
                "ratio": ratio,
            }
    for arm in arms[1:]:
        if arm.logprobs_T is not None and adapter.logprobs_T is not None:
            gaps_T = np.abs(arm.logprobs_T - adapter.logprobs_T)
            yield {
                "table": "parity with the adapter, log-probabilities of one prompt",
                "arm": arm.name,
                "median gap": float(np.median(gaps_T)),
                "largest gap": float(gaps_T.max()),
            }
