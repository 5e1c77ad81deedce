"""What a worker is told before anything else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openmint.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """First message to a worker: what to load and where the bytes are."""

    base: str
    """The embedded base's name, or a local Hugging Face folder."""
    data: Path
    store_url: str
    """Where the store is, unless in `data`; see `Settings`."""
    config: WorkerConfig
    threads: int
    replica: int = 0
    """Which worker of the base this is. The first, 0, has its training runs and their journal."""
