"""Everything that a route may reach, joined once by `cli/serve.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openmint.config import Settings
from openmint.service.workers import Workers

if TYPE_CHECKING:
    from openmint.catalog.catalog import Catalog
    from openmint.store.blobs import BlobStore


@dataclass(frozen=True, slots=True)
class Gateway:
    """The control plane of one process; lives on one event loop."""

    settings: Settings
    catalog: Catalog
    store: BlobStore
    workers: Workers
