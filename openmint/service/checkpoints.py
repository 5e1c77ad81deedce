"""Named saves of runs: training states, sampler revisions, external (PEFT) folders.

A save's result means: the bytes are durable in the store and the record is in the catalogue, in
that order. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from openmint.catalog.address import TinkerPath
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Checkpoint, Segment
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.scheduler.work import ExportRun, RestoreRun, SavedBlob, SaveRun
from openmint.service import checks
from openmint.service.collector import Collector
from openmint.service.fingerprint import fingerprint
from openmint.service.futures import ResultFuture
from openmint.service.limits import Limits
from openmint.service.links import Links
from openmint.service.meter import Meter
from openmint.service.orders import LoadOrder, SamplerOrder, SaveOrder
from openmint.service.probes import Probes, Published
from openmint.service.resolve import path_of, readable_checkpoint
from openmint.service.runs import LiveRun, Runs
from openmint.service.sampling import Sampler, Sampling
from openmint.service.sessions import Sessions
from openmint.service.training import NewRun, Training
from openmint.service.workers import Workers
from openmint.store.blobs import BlobStore
from openmint.store.peft_file import to_peft
from openmint.types import Digest, RunId, SessionId, Tenant

EXTERNAL_FILES = ("adapter_config.json", "adapter_model.safetensors")


SAVES: dict[Segment, str] = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}
"""What the request is called that makes a checkpoint of each segment."""


@dataclass(frozen=True, slots=True)
class CopyTo:
    """Where a copy goes: a run slot of a session, or a session of its own in a project."""

    session_id: SessionId | None
    model_seq_id: int | None
    project_id: str | None
    ttl_seconds: int | None


class Checkpoints:
    """Saves, loads and manages checkpoints."""

    def __init__(
        self,
        catalog: Catalog,
        store: BlobStore,
        workers: Workers,
        sessions: Sessions,
        runs: Runs,
        training: Training,
        sampling: Sampling,
        collector: Collector,
        probes: Probes,
        limits: Limits,
        meter: Meter,
    ) -> None:
        self._catalog, self._store, self._workers = catalog, store, workers
        self._probes, self._limits, self._meter = probes, limits, meter
        self._sessions, self._sampling, self._collector = sessions, sampling, collector
        self._runs, self._training = runs, training
        self.links = Links()
        runs.performs(SaveOrder, self._save)
        runs.performs(SamplerOrder, self._open_sampler)
        runs.performs(LoadOrder, self._load)

    # -- saving -------------------------------------------------------------------------------

    def save(self, run: LiveRun, seq: int | None, order: SaveOrder) -> ResultFuture:
        """Save the run. Its result: the bytes and their record are durable.

        Segment `weights` holds weights, moments and step count; `sampler_weights` is a named
        revision, to which the policy's alias `latest` moves; `external_weights` is a PEFT folder
        for download.
        """
        path = TinkerPath(run.run_id, order.segment, checks.check_name(order.name, "path"))
        content = fingerprint(order)
        if not self._runs.is_known(run, seq):
            self._limits.check_stored(run.tenant)
            if not order.overwrite:
                self._refuse_taken(run, path)
        return self._runs.submit(run, seq, SAVES[order.segment], content, order)

    def _refuse_taken(self, run: LiveRun, path: TinkerPath) -> None:
        try:
            self._catalog.checkpoint(run.tenant, run.run_id, path.segment, path.name)
        except NotFound:
            return
        raise Conflict(f"checkpoint {path} exists; choose another name, or send overwrite=true")

    async def _save(self, run: LiveRun, seq: int, order: SaveOrder) -> object:
        command: SaveRun | ExportRun = SaveRun(run.run_id, run.tenant)
        if order.segment != "weights":
            keep = order.segment == "sampler_weights"
            command = ExportRun(run.run_id, run.tenant, keep_resident=keep)
        with self._collector.saving():
            blob = await self._runs.call(run, command)
            assert isinstance(blob, SavedBlob)
            await self._collector.spare(blob.digest)
            await asyncio.to_thread(
                self._catalog.add_checkpoint,
                run.tenant,
                run.run_id,
                order.segment,
                order.name,
                blob,
                ttl_seconds=order.ttl_seconds,
                # What has the name is what an earlier try of this request left there.
                overwrite=order.overwrite or run.pending[seq].is_again,
                user_metadata=order.user_metadata,
            )
        if order.segment == "sampler_weights":
            self._probe(run, blob.digest)
        self._meter.saved(run.tenant, run.base.name)
        path = TinkerPath(run.run_id, order.segment, order.name)
        return {"path": str(path), "size_bytes": blob.size_bytes, "type": SAVES[order.segment]}

    def _probe(self, run: LiveRun, revision: Digest) -> None:
        published = Published(run.tenant, run.policy, run.base.digest, revision)
        self._probes.after_publish(published)

    def open_sampler(
        self, run: LiveRun, seq: int | None, sampling_seq: int, *, inflight: bool
    ) -> ResultFuture:
        """A sampler on the run's current weights, handed over without a name.

        With `inflight`, later in-flight saves of the run move this sampler to their weights.
        """
        order = SamplerOrder(sampling_seq, inflight)
        kind = SAVES["sampler_weights"]
        # Without its number: the SDK draws a new one each time that it sends the request again.
        content = fingerprint("sampler", inflight)
        return self._runs.submit(run, seq, kind, content, order)

    async def _open_sampler(self, run: LiveRun, _seq: int, order: SamplerOrder) -> object:
        sampler_id = f"{run.session_id}:sample:{order.sampling_seq}"
        command = ExportRun(run.run_id, run.tenant, keep_resident=True)
        with self._collector.saving():
            blob = await self._runs.call(run, command)
            assert isinstance(blob, SavedBlob)
            await self._collector.spare(blob.digest)
            await asyncio.to_thread(
                self._catalog.add_run_revision, run.tenant, run.run_id, blob, ephemeral=True
            )
        self._probe(run, blob.digest)
        follows = run.run_id if order.inflight else None
        sampler = Sampler(
            sampler_id, run.tenant, run.session_id, run.base, blob.digest, None, follows
        )
        await self._sampling.add(sampler)
        if order.inflight:
            await self._sampling.publish_inflight(run.run_id, blob.digest)
        return {"sampling_session_id": sampler_id, "type": SAVES["sampler_weights"]}

    # -- loading ------------------------------------------------------------------------------

    def readable(self, tenant: Tenant, path: str) -> Checkpoint:
        """The tenant's own checkpoint, or a published one. Raises InvalidRequest, NotFound."""
        return readable_checkpoint(self._catalog, tenant, path)

    def load(self, run: LiveRun, seq: int | None, path: str, *, optimizer: bool) -> ResultFuture:
        """Overwrite a run's weights, and with `optimizer` its moments and step count."""
        found = self._loadable(run.tenant, path, optimizer)
        if found.base_digest != run.base.digest:
            raise InvalidRequest(f"{path} belongs to base {found.base_name}, not {run.base.name}")
        if found.spec != run.spec:
            raise InvalidRequest(
                f"{path} holds {found.spec}, the run trains {run.spec}; "
                "start a run from it with create_training_client_from_state"
            )
        order = LoadOrder(path, _restore(run.run_id, run.tenant, found, optimizer))
        content = fingerprint("load", path, optimizer)
        return self._runs.submit(run, seq, "load_weights", content, order)

    async def _load(self, run: LiveRun, _seq: int, order: LoadOrder) -> object:
        await self._runs.call(run, order.command)
        return {"path": order.path, "model_id": run.run_id, "type": "load_weights"}

    def create_from(
        self,
        tenant: Tenant,
        session_id: SessionId,
        model_seq_id: int,
        path: str,
        *,
        optimizer: bool,
        base_model: str | None,
        user_metadata: Mapping[str, str],
    ) -> tuple[NewRun, ResultFuture]:
        """Start a run that has the checkpoint's shape and weights."""
        found = self._loadable(tenant, path, optimizer)
        base = self._workers.by_digest(found.base_digest).base
        if base_model and self._workers.by_name(base_model).base.digest != base.digest:
            raise InvalidRequest(f"{path} belongs to base {base.name}, not {base_model}")
        new = NewRun(tenant, session_id, model_seq_id, base, found.spec, user_metadata)
        command = _restore(new.run_id, tenant, found, optimizer)
        content = fingerprint(new, path, optimizer)
        return new, self._training.open_run(new, "load_weights", content, command)

    def _loadable(self, tenant: Tenant, path: str, optimizer: bool) -> Checkpoint:
        found = self.readable(tenant, path)
        if found.segment == "external_weights":
            raise InvalidRequest(f"{path} is for download only; load a weights checkpoint")
        if optimizer and found.segment != "weights":
            raise InvalidRequest(f"{path} holds no optimizer state; load it with optimizer=false")
        return found

    # -- managing -----------------------------------------------------------------------------

    async def delete(self, tenant: Tenant, path: TinkerPath, *, actor: str) -> None:
        """Delete the record; bytes that nothing else needs are collected. Raises NotFound."""
        await asyncio.to_thread(
            self._catalog.delete_checkpoint,
            tenant,
            path.run_id,
            path.segment,
            path.name,
            actor=actor,
        )

    async def set_public(
        self, tenant: Tenant, path: TinkerPath, *, public: bool, actor: str
    ) -> None:
        """Publish or withdraw. Raises NotFound."""
        await asyncio.to_thread(
            self._catalog.set_checkpoint_public,
            tenant,
            path.run_id,
            path.segment,
            path.name,
            public,
            actor=actor,
        )

    async def set_ttl(self, tenant: Tenant, path: TinkerPath, ttl_seconds: int | None) -> None:
        """Have it expire that long from now; None for never. Raises NotFound."""
        await asyncio.to_thread(
            self._catalog.set_checkpoint_ttl,
            tenant,
            path.run_id,
            path.segment,
            path.name,
            ttl_seconds,
        )

    def external_links(
        self, tenant: Tenant, path: TinkerPath
    ) -> tuple[dict[str, tuple[Digest, str]], datetime]:
        """Per file of an external checkpoint its digest and link token, and when they expire."""
        found = self._catalog.checkpoint(tenant, path.run_id, path.segment, path.name)
        if path.segment != "external_weights":
            raise InvalidRequest(f"{path} is not an external_weights checkpoint")
        files, expires = {}, 0.0
        for file in EXTERNAL_FILES:
            token, expires = self.links.sign(f"{found.base_digest}/{found.digest}/{file}")
            files[file] = (found.digest, f"{found.base_digest}-{token}")
        return files, datetime.fromtimestamp(expires, UTC)

    async def external_file(self, digest: str, file: str, token: str) -> bytes:
        """One file of a PEFT folder, for a signed token. Raises NotFound."""
        base_digest, _, signature = token.partition("-")
        self.links.check(f"{base_digest}/{digest}/{file}", signature)
        base = self._workers.by_digest(Digest(base_digest)).base
        data = await asyncio.to_thread(self._store.get, Digest(digest))
        return (await asyncio.to_thread(to_peft, data, base))[file]

    async def copy(
        self, tenant: Tenant, source_path: str, to: CopyTo, retry_key: str | None
    ) -> TinkerPath:
        """The path of a copy, which shares the source's bytes; the same for a retry."""
        found = self.readable(tenant, source_path)
        base = self._workers.by_digest(found.base_digest).base
        session_id, model_seq_id = to.session_id, to.model_seq_id or 0
        if session_id is None:
            session_id = await self._sessions.create(
                tenant,
                retry_key,
                user_metadata={},
                display_name=f"copy of {found.name}",
                project_id=to.project_id,
                tags=(),
            )
            await self._sessions.finish(tenant, session_id, "success")
        else:
            self._sessions.touch(tenant, session_id)
        new = NewRun(tenant, session_id, model_seq_id, base, found.spec, {})
        await asyncio.to_thread(self._catalog.copy_checkpoint, found, new, to.ttl_seconds)
        return TinkerPath(new.run_id, found.segment, found.name)

    async def expire(self) -> None:
        """Delete the checkpoints whose time has come."""
        for expired in await asyncio.to_thread(self._catalog.expired_checkpoints):
            with suppress(NotFound):  # its owner was faster
                await self.delete(expired.tenant, path_of(expired), actor="expiry")


def _restore(run_id: RunId, tenant: Tenant, found: Checkpoint, optimizer: bool) -> RestoreRun:
    kind: Literal["training", "revision"] = "training" if found.segment == "weights" else "revision"
    return RestoreRun(run_id, tenant, found.digest, kind, optimizer)
