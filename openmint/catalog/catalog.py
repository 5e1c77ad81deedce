"""The catalogue: every name, owner and lineage, on one SQL database; no bytes of weights.

One method is one transaction. Reads take tens of microseconds, on PostgreSQL some hundreds, and
suit the event loop; writes wait for the disk and belong on a thread. Thread-safe; other processes
may write to the same database.
A method that takes an id takes the tenant too, and what is another tenant's is NotFound.
"""

from __future__ import annotations

from openmint.catalog.aliases import AliasRecords
from openmint.catalog.audit import AuditRecords
from openmint.catalog.bases import BaseRecords
from openmint.catalog.canaries import CanaryRecords
from openmint.catalog.checkpoints import CheckpointRecords, SamplerRecords
from openmint.catalog.database import Database
from openmint.catalog.evaluations import EvaluationRecords
from openmint.catalog.garbage import GarbageRecords
from openmint.catalog.gates import GateRecords
from openmint.catalog.imports import ImportRecords
from openmint.catalog.keys import KeyRecords, load_pepper
from openmint.catalog.pins import PinRecords
from openmint.catalog.policies import PolicyRecords, RunRecords
from openmint.catalog.requests import RequestRecords
from openmint.catalog.retention import RetentionRecords
from openmint.catalog.revisions import RevisionRecords
from openmint.catalog.schedules import ScheduleRecords
from openmint.catalog.search import SearchRecords
from openmint.catalog.sessions import SessionRecords
from openmint.catalog.tags import TagRecords
from openmint.catalog.tenants import TenantRecords
from openmint.catalog.watches import WatchRecords


class Catalog(
    KeyRecords,
    SessionRecords,
    PolicyRecords,
    SearchRecords,
    TagRecords,
    RunRecords,
    RequestRecords,
    RevisionRecords,
    CheckpointRecords,
    SamplerRecords,
    AliasRecords,
    ImportRecords,
    CanaryRecords,
    GateRecords,
    WatchRecords,
    PinRecords,
    ScheduleRecords,
    EvaluationRecords,
    AuditRecords,
    GarbageRecords,
    RetentionRecords,
    TenantRecords,
    BaseRecords,
):
    """All nouns of the catalogue in one handle; each base class is one of them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.write() as connection:
            self._pepper = load_pepper(connection)

    @classmethod
    def open(cls, url: str) -> Catalog:
        """The catalogue at an SQLAlchemy URL, made or brought up to date first.

        Raises InvalidRequest for a URL or a database that can't be used, Overloaded when its
        server can't be reached.
        """
        return cls(Database(url))

    def claim(self) -> None:
        """Be the one service on this database. Raises Conflict while another process is."""
        self._database.claim()

    def close(self) -> None:
        """Wait for the write in progress, then let go of the database."""
        self._database.close()
