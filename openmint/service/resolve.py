"""Checkpoint paths: which checkpoint a `tinker://` address means to a tenant."""

from __future__ import annotations

from openmint.catalog.address import TinkerPath, segment_of
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Checkpoint
from openmint.errors import NotFound
from openmint.types import RunId, Tenant


def checkpoint_path(run_id: str, segment: str, name: str) -> TinkerPath:
    """The path of these parts. Raises InvalidRequest for an unknown segment."""
    return TinkerPath(RunId(run_id), segment_of(segment), name)


def path_of(checkpoint: Checkpoint) -> TinkerPath:
    return TinkerPath(checkpoint.run_id, checkpoint.segment, checkpoint.name)


def readable_checkpoint(catalog: Catalog, tenant: Tenant, path: str) -> Checkpoint:
    """The checkpoint at `path`, the tenant's own or one that its owner published.

    Raises InvalidRequest for a malformed path, NotFound.
    """
    parsed = TinkerPath.parse(path)
    try:
        return catalog.readable_checkpoint(tenant, parsed.run_id, parsed.segment, parsed.name)
    except NotFound:
        raise NotFound(f"no checkpoint {path[:300]}, or it is not published to you") from None
