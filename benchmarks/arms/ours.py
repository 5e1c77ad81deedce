"""What do OpenMinT's engine and scheduler do in a turn? Our arms, without HTTP.

Only the seams that a worker uses are touched: `Engine`, `Scheduler` and the words between them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arms.protocol import Turn, serve
from benchmarks.arms.steps import StepLog, decode_answer, prompts, token_rows
from benchmarks.in_process import DIGEST, TENANT, InProcess, next_tokens
from openmint.config import WorkerConfig
from openmint.engine.engine import Engine
from openmint.engine.formats import AdapterArchive
from openmint.engine.plan import MicroBatch, TrainItem
from openmint.models.loader import load_model
from openmint.scheduler.work import (
    CreateRun,
    DropRun,
    ExportRun,
    OptimWork,
    SampleWork,
    TrainWork,
)
from openmint.store.folder_store import FolderStore
from openmint.store.peft_file import to_peft
from openmint.types import (
    AdamParams,
    Digest,
    LoraSpec,
    LossSpec,
    RunId,
    SamplingParams,
)

ADAPTER_STEPS, ADAPTER_LEARNING_RATE = 2, 3e-3
"""Enough for an adapter to change what the base says, too little to make noise of it."""


class Service(InProcess):
    """A base from its folder, and a store."""

    def __init__(self, base: str, store: Path, **worker: Any) -> None:
        threads = int(os.environ["OMP_NUM_THREADS"])
        torch.set_num_threads(threads)
        self.config = WorkerConfig(threads=threads, **worker)
        model, self.base = load_model("base", Path(base), DIGEST, self.config)
        engine = Engine(model, self.base, self.config)
        self.blobs = FolderStore(store)
        super().__init__(engine, AdapterArchive(self.blobs, self.base), self.config)


@cache
def service(base: str, store: str | None = None, **worker: Any) -> Service:
    """One resident base for all arms that want the same settings."""
    return Service(base, Path(store or tempfile.mkdtemp(prefix="openmint-bench-")), **worker)


# -- training -------------------------------------------------------------------------------------


@dataclass
class Training:
    """Forward and backward of one step, then its optimizer steps, timed apart.

    `mixed` deals the sequences of all policies in turn, so that each micro-batch holds as many
    policies as it has room for; without it a policy's data stand together, as the scheduler puts
    them.
    """

    base: str
    sequences: int
    length: int
    policies: int = 1
    unembed: bool = False
    mixed: bool = False
    _work_ids: Iterator[int] = field(init=False, default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self._service = service(self.base)
        spec = LoraSpec(rank=8, train_unembed=self.unembed)
        self._name = f"{self.policies}-{self.unembed}-{self.mixed}-{self.length}"
        self._runs = [RunId(f"{self._name}-{i}") for i in range(self.policies)]
        for seed, run_id in enumerate(self._runs):
            self._service.engine.create_run(run_id, spec, seed)
        rows = token_rows(self.sequences, self.length + 1, seed=0)
        self._data = [tuple(map(next_tokens, rows[i :: self.policies])) for i in self._each]

    @property
    def _each(self) -> range:
        return range(self.policies)

    def __call__(self, lap: int) -> dict[str, Any]:
        engine = self._service.engine
        started_at = time.perf_counter()
        works = [next(self._work_ids) for _ in self._each]
        for work_id, run_id, data in zip(works, self._runs, self._data, strict=True):
            engine.open_train(work_id, run_id, data, LossSpec("cross_entropy"), False)
        for micro_batch in self._micro_batches(works):
            engine.train(micro_batch)
        losses = [engine.close_train(work_id)[1]["loss:sum"] for work_id in works]
        trained_at = time.perf_counter()
        for run_id in self._runs:
            engine.publish_update(run_id, engine.prepare_update(run_id, AdamParams()))
        tokens = self.sequences * self.length
        return {
            "seconds": trained_at - started_at,
            "tokens": tokens,
            "loss_per_token": sum(losses) / tokens,
            "optimizer_ms": 1000 * (time.perf_counter() - trained_at),
        }

    def _micro_batches(self, works: list[int]) -> list[MicroBatch]:
        """All data, packed greedily up to the scheduler's own size."""
        own = range(self.sequences // self.policies)
        if self.mixed:
            items = [TrainItem(work, index) for index in own for work in works]
        else:
            items = [TrainItem(work, index) for work in works for index in own]
        each = max(1, self._service.config.micro_batch_tokens // self.length)
        parts = [tuple(items[start : start + each]) for start in range(0, len(items), each)]
        return [MicroBatch(part, len(part) * self.length) for part in parts]


# -- decoding -------------------------------------------------------------------------------------


@dataclass
class Decoding:
    """`rounds` times: `sequences` new prompts at once, greedy, to the last token.

    `adapters` are digests in `store`; sequence i uses the i-th.
    """

    base: str
    sequences: int
    tokens_in: int
    tokens_out: int
    rounds: int = 1
    store: str | None = None
    adapters: list[str] | None = None
    worker: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._service = service(self.base, self.store, **self.worker)

    def __call__(self, lap: int) -> dict[str, Any]:
        logs, first_tokens = [], []
        for round_ in range(self.rounds):
            rows = prompts(self.sequences, self.tokens_in, lap, round_)
            log, first = self._generate(rows)
            logs.append(log)
            first_tokens += first
        return decode_answer(logs, first_tokens)

    def _generate(self, rows: np.ndarray[Any, Any]) -> tuple[StepLog, list[int]]:
        params = SamplingParams(max_tokens=self.tokens_out, temperature=0.0)
        scheduler = self._service.scheduler
        log, drawn = StepLog(self.sequences), scheduler.stats().generated_tokens
        works = []
        for i, row in enumerate(rows):
            revision = Digest(self.adapters[i]) if self.adapters else None
            works.append(self._service.submit(SampleWork(TENANT, revision, row, params)))
        for _ in self._service.steps():
            before, drawn = drawn, scheduler.stats().generated_tokens
            log.step(drawn - before)
        results = [self._service.result(work_id) for work_id in works]
        return log, [int(result.sequences[0].tokens_N[0]) for result in results]


# -- adapters -------------------------------------------------------------------------------------


@dataclass
class AdapterMaker:
    """Not an arm that races: trains `count` small adapters and leaves them in two forms.

    Blobs go to `folder/store`, PEFT folders of the same values to `folder/peft/<i>`; the digests
    are in the answer.
    """

    base: str
    folder: str
    count: int

    def __call__(self, lap: int) -> dict[str, Any]:
        started_at = time.perf_counter()
        bench = service(self.base, str(Path(self.folder) / "store"))
        digests = [self._make(bench, i) for i in range(self.count)]
        seconds = time.perf_counter() - started_at
        return {"seconds": seconds, "tokens": 0, "adapters": digests}

    def _make(self, bench: Service, index: int) -> str:
        run_id = RunId(f"adapter-{index}")
        spec = LoraSpec(rank=8, train_unembed=False)
        bench.do(CreateRun(run_id, TENANT, spec, seed=index))
        data = tuple(map(next_tokens, token_rows(2, 33, seed=10_000 + index)))
        adam = AdamParams(learning_rate=ADAPTER_LEARNING_RATE)
        for _ in range(ADAPTER_STEPS):
            bench.do(TrainWork(run_id, TENANT, data, LossSpec("cross_entropy"), False))
            bench.do(OptimWork(run_id, TENANT, adam))
        digest: Digest = bench.do(ExportRun(run_id, TENANT, keep_resident=False)).digest
        bench.do(DropRun(run_id, TENANT))
        folder = Path(self.folder) / "peft" / str(index)
        folder.mkdir(parents=True)
        for name, content in to_peft(bench.blobs.get(digest), bench.base).items():
            (folder / name).write_bytes(content)
        return str(digest)


KINDS: dict[str, Callable[..., Turn]] = {
    "train": Training,
    "decode": Decoding,
    "make adapters": AdapterMaker,
}

if __name__ == "__main__":
    serve(KINDS, packages=("torch", "transformers", "numpy"))
