"""Adapters in and out: PEFT folders become revisions, revisions become PEFT folders.

Bytes are written before their record. Lives on the event loop; everything heavy runs in threads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from openmint.catalog.address import NAME
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import ImportOutcome, Revision
from openmint.errors import InvalidRequest, OpenMintError
from openmint.scheduler.work import SavedBlob
from openmint.service.archives import PeftFolder, adapters_in, tar_of
from openmint.service.collector import Collector
from openmint.service.limits import Limits
from openmint.service.probes import Probes, Published
from openmint.service.workers import Workers
from openmint.store.adapter_file import check_adapter
from openmint.store.blobs import BlobStore, digest_of
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

    async def import_archive(
        self, tenant: Tenant, base_name: str | None, archive: bytes, *, actor: str
    ) -> list[ImportOutcome]:
        """One outcome for each adapter of a tar (`archives.py`), in the order of their paths.

        What fits is recorded in one transaction, durable on return, as `import_peft` would record
        it; what doesn't is refused by itself. A retry gives the same revisions. None of them is
        probed. Raises InvalidRequest for a bad archive, NotFound for the base.
        """
        base = self.workers.by_name(base_name).base if base_name else self._only_base()
        self.limits.check_stored(tenant)
        with self.collector.saving():
            admitted, refused = await asyncio.to_thread(self._store_all, tenant, base, archive)
            for _, blob in admitted:
                await self.collector.spare(blob.digest)
            imports = [(folder.policy, blob) for folder, blob in admitted]
            numbers = await asyncio.to_thread(
                self.catalog.import_revisions, tenant, base, imports, actor=actor
            )
        done = [
            ImportOutcome(folder.path, folder.policy, blob.digest, number)
            for (folder, blob), number in zip(admitted, numbers, strict=True)
        ]
        return sorted([*done, *refused], key=lambda outcome: outcome.path)

    def _store_all(
        self, tenant: Tenant, base: BaseInfo, archive: bytes
    ) -> tuple[list[tuple[PeftFolder, SavedBlob]], list[ImportOutcome]]:
        folders = adapters_in(archive)
        taken = self.catalog.policies_of_other_bases(tenant, {f.policy for f in folders}, base)
        admitted, refused = admit_all(folders, base, taken)
        self.store.put_many(data for _, data, _ in admitted)
        return [(folder, blob) for folder, _, blob in admitted], refused

    async def export_peft(self, revision: Revision) -> bytes:
        """A tar of the revision's PEFT folder; the same bytes every time.

        Raises NotFound when its base is not resident, StoreFailed.
        """
        base = self.workers.by_digest(revision.base_digest).base
        return await asyncio.to_thread(self._peft_tar, revision, base)

    def _store_peft(self, config: Mapping[str, Any], weights: bytes, base: BaseInfo) -> SavedBlob:
        data, blob = admit(config, weights, base)
        self.store.put(data)
        return blob

    def _only_base(self) -> BaseInfo:
        clients = self.workers.first()
        if len(clients) != 1:
            names = ", ".join(sorted(client.base.name for client in clients)) or "none"
            raise InvalidRequest(f"name the base of the adapter; resident: {names}")
        return clients[0].base

    def _peft_tar(self, revision: Revision, base: BaseInfo) -> bytes:
        return tar_of(to_peft(self.store.get(revision.digest), base))


def admit(config: Mapping[str, Any], weights: bytes, base: BaseInfo) -> tuple[bytes, SavedBlob]:
    """The adapter file of a PEFT adapter that fits the base, and its record once it is stored.

    Raises UnsupportedFormat for a pickle, InvalidRequest with the list of what does not fit.
    """
    data = from_peft(weights, config, base)
    spec = check_adapter(data, base).spec
    return data, SavedBlob(digest_of(data), len(data), spec, num_optim_steps=0)


Admitted = tuple[PeftFolder, bytes, SavedBlob]


def admit_all(
    folders: Iterable[PeftFolder], base: BaseInfo, taken: Collection[str]
) -> tuple[list[Admitted], list[ImportOutcome]]:
    """Those that fit, and the refusals of the others; policies in `taken` have another base."""
    admitted: list[Admitted] = []
    refused: list[ImportOutcome] = []
    for folder in folders:
        try:
            if folder.policy in taken:
                raise InvalidRequest(
                    f"policy {folder.policy!r} belongs to another base than {base.name}"
                )
            data, blob = admit(parse_config(folder.config), folder.weights, base)
            admitted.append((folder, data, blob))
        except OpenMintError as error:
            refused.append(ImportOutcome(folder.path, folder.policy, error=error.message))
    return admitted, refused


def parse_config(raw: bytes) -> dict[str, Any]:
    """An adapter_config.json. Raises InvalidRequest."""
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"adapter_config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidRequest("adapter_config.json must be a JSON object")
    return config
