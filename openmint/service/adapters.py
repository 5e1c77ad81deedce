"""Adapters in and out: PEFT folders become revisions, revisions become PEFT folders.

Bytes are written before their record. Lives on the event loop; everything heavy runs in threads.
"""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openmint.catalog.address import NAME
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Revision
from openmint.errors import InvalidRequest
from openmint.scheduler.work import SavedBlob
from openmint.service.collector import Collector
from openmint.service.limits import Limits
from openmint.service.probes import Probes, Published
from openmint.service.workers import Workers
from openmint.store.adapter_file import check_adapter
from openmint.store.blobs import BlobStore
from openmint.store.peft_file import from_peft, to_peft
from openmint.types import BaseInfo, Tenant


@dataclass(frozen=True, slots=True)
class Adapters:
    catalog: Catalog
    store: BlobStore
    workers: Workers
    collector: Collector
    probes: Probes
    limits: Limits

    async def import_peft(
        self,
        tenant: Tenant,
        policy: str,
        base_name: str | None,
        config: Mapping[str, Any],
        weights: bytes,
        *,
        actor: str,
    ) -> Revision:
        """The policy's new revision, made of a PEFT adapter; alias `latest` moves to it.

        The policy is made when it is not there; without `base_name` the only base is meant.
        Durable on return, and a retry gives the same revision. Raises UnsupportedFormat for a
        pickle, InvalidRequest with the list of what does not fit the base, NotFound for the base.
        """
        if not NAME.fullmatch(policy):
            raise InvalidRequest(f"policy {policy[:200]!r} must match {NAME.pattern}")
        base = self.workers.by_name(base_name).base if base_name else self._only_base()
        self.limits.check_stored(tenant)
        with self.collector.saving():
            blob = await asyncio.to_thread(self._store_peft, config, weights, base)
            await self.collector.spare(blob.digest)
            revision = await asyncio.to_thread(
                self.catalog.import_revision, tenant, policy, base, blob, actor=actor
            )
        self.probes.after_publish(Published(tenant, policy, base.digest, revision.digest))
        return revision

    async def export_peft(self, revision: Revision) -> bytes:
        """A tar of the revision's PEFT folder; the same bytes every time.

        Raises NotFound when its base is not resident, StoreFailed.
        """
        base = self.workers.by_digest(revision.base_digest).base
        return await asyncio.to_thread(self._peft_tar, revision, base)

    def _store_peft(self, config: Mapping[str, Any], weights: bytes, base: BaseInfo) -> SavedBlob:
        data = from_peft(weights, config, base)
        spec = check_adapter(data, base).spec
        return SavedBlob(self.store.put(data), len(data), spec, num_optim_steps=0)

    def _only_base(self) -> BaseInfo:
        clients = self.workers.first()
        if len(clients) != 1:
            names = ", ".join(sorted(client.base.name for client in clients)) or "none"
            raise InvalidRequest(f"name the base of the adapter; resident: {names}")
        return clients[0].base

    def _peft_tar(self, revision: Revision, base: BaseInfo) -> bytes:
        return tar_of(to_peft(self.store.get(revision.digest), base))


def parse_config(raw: bytes) -> dict[str, Any]:
    """An adapter_config.json. Raises InvalidRequest."""
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"adapter_config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidRequest("adapter_config.json must be a JSON object")
    return config


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed tar; equal files give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
