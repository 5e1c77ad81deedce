"""What a worker holds in memory, found without asking its objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openmint.config import WorkerConfig
from openmint.engine.engine import Engine
from openmint.kernels.compile import compile_kernels
from openmint.layers.ranks import ALONE, Division, Ranks
from openmint.models.loader import DTYPES, load_model
from openmint.plan.placement import Placement
from openmint.types import Digest, LoraSpec, RunId


@dataclass(frozen=True)
class Held:
    """Bytes of a worker on one device."""

    weights: int
    kv_cache: int
    run: int
    slot: int


def measured(folder: Path, dtype: str, spec: LoraSpec, kv_cache_bytes: int) -> Held:
    """Of a worker that loads this base and starts a run of this spec."""
    config = WorkerConfig(dtype=dtype, kv_cache_bytes=kv_cache_bytes)
    compile_kernels(DTYPES[dtype])  # keeps a chunk of memory for itself, once per process
    with _what_is_there_left_out():
        model, base = load_model("planned", folder, Digest("sha256:" + "0" * 64), config)
        with_base = held_bytes()
        engine = Engine(model, base, config)
        with_cache = held_bytes()
        engine.create_run(RunId("run"), spec, 0)
        with_run = held_bytes()
        slot = engine.slot_bytes(engine.export_run(RunId("run"))[0])
    return Held(with_base, with_cache - with_base, with_run - with_cache, slot)


@dataclass(frozen=True, slots=True)
class Pretended(Ranks):
    """One of several ranks, alone."""

    def gather_values(self, value: Any) -> list[Any]:
        return [value]


def division_of(placement: Placement, rank: int) -> Division:
    """One rank's, without the others."""
    ranks = Pretended(rank, placement.ranks)
    degrees = (placement.tensor, placement.expert, placement.data)
    return Division(*(ranks if degree > 1 else ALONE for degree in degrees))


def held_bytes() -> int:
    """Of all tensors alive that have memory; memory that several share counts once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type != "meta":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def _what_is_there_left_out() -> Iterator[None]:
    """Objects that were made before aren't looked at."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
