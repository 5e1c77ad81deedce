"""Benches on bases of random weights, and what the questions share: adapters, prompts, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.base import make_model
from benchmarks.gpu.scale import Scale
from benchmarks.in_process import DIGEST, TENANT, InProcess
from openmint.config import WorkerConfig
from openmint.engine.engine import Engine
from openmint.engine.formats import AdapterArchive
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.models.loader import DTYPES, describe
from openmint.scheduler.work import (
    CreateRun,
    SampleResult,
    SampleWork,
)
from openmint.store.folder_store import FolderStore
from openmint.types import (
    BaseInfo,
    Digest,
    IntArray,
    LoraSpec,
    RunId,
    SamplingParams,
)

ADAPTER_SPREAD = 0.02
"""Of B's values: enough for an adapter to change what the base says."""

MakeArchive = Callable[[BaseInfo], Any]


class Bench(InProcess):
    """A base that is resident already."""

    def __init__(
        self, model: Any, base: BaseInfo, config: WorkerConfig, make_archive: MakeArchive
    ) -> None:
        self.model, self.base = model, base
        engine = Engine(model, base, config)
        self.archive = make_archive(base)
        super().__init__(engine, self.archive, config)

    def sample(
        self, prompt_T: IntArray, tokens_out: int, revision: Digest | None = None, **more: Any
    ) -> SampleResult:
        """Greedy, to the last token."""
        params = SamplingParams(max_tokens=tokens_out, temperature=0.0)
        result: SampleResult = self.do(SampleWork(TENANT, revision, prompt_T, params, **more))
        return result

    def make_run(self, name: str, spec: LoraSpec, seed: int) -> RunId:
        """A training session whose adapter already does something."""
        run_id = RunId(name)
        self.do(CreateRun(run_id, TENANT, spec, seed))
        run = self.engine.runs[run_id]
        params_P = run.state.params_P.clone()
        generator = generator_on(params_P.device, seed)
        for _, b_RO in run.layout.views(params_P).values():
            b_RO.normal_(0.0, ADAPTER_SPREAD, generator=generator)
        run.set_state(type(run.state).fresh(params_P))
        return run_id


def stored(folder: Path) -> MakeArchive:
    """Revisions in a store, as a worker has them."""
    return lambda base: AdapterArchive(FolderStore(folder), base)


def make_bench(scale: Scale, make_archive: MakeArchive, **worker: Any) -> Bench:
    """A bench on a new random base."""
    model, hf_config = make_model(scale)
    settings = {**scale.worker, **worker}
    config = WorkerConfig(device=scale.device, dtype=scale.dtype, **settings)
    base = describe(model, hf_config, config, name=scale.name, digest=DIGEST, directory="")
    return Bench(model, base, config, make_archive)


@dataclass
class MadeAdapters:
    """Stands where the store does: draws the adapter that a digest names, on the device."""

    spec: LoraSpec
    base: BaseInfo

    def __post_init__(self) -> None:
        self._layout = AdapterLayout(self.spec, self.base.targets_of(self.spec))

    @staticmethod
    def digest(index: int) -> Digest:
        return Digest(f"sha256:{index:064x}")

    def load_revision(self, revision: Digest) -> AdapterWeights:
        device = torch.device(self.base.device)
        flat_P = torch.empty(self._layout.num_params, dtype=DTYPES[self.base.dtype], device=device)
        seed = int(revision.removeprefix("sha256:"), 16)
        flat_P.normal_(0.0, ADAPTER_SPREAD, generator=generator_on(device, seed))
        return AdapterWeights(self._layout, flat_P, revision)


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def prompts(count: int, length: int, vocab_size: int, seed: int) -> IntArray:
    """`count` rows of random tokens, none seen before: earlier ones may be cached."""
    return np.random.default_rng(seed).integers(3, vocab_size, (count, length))


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds_of(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """How long the work took, the device's part included, and what came of it."""
    synchronize(device)
    started_at = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started_at, result


def peak_gib(device: str) -> float | None:
    """Most device memory since the process began, as torch counts it; None on CPUs."""
    if torch.device(device).type != "cuda":
        return None
    return float(torch.cuda.max_memory_allocated()) / 2**30
