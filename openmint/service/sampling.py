"""Sampling sessions (samplers) and samples. A sampler is bound to one revision when it is made.

Samples are not logged: a client repeats what it did not get. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from dataclasses import dataclass, field, replace

import numpy as np

from openmint.catalog.catalog import Catalog
from openmint.errors import InvalidRequest, NotFound, RequestError
from openmint.scheduler.work import SampleResult, SampleWork
from openmint.service import checks
from openmint.service.feeds import Feed
from openmint.service.fingerprint import fingerprint
from openmint.service.futures import Futures, ResultFuture
from openmint.service.limits import Limits
from openmint.service.resolve import readable_checkpoint
from openmint.service.sessions import Sessions
from openmint.service.workers import Workers
from openmint.types import (
    BaseInfo,
    Digest,
    FloatArray,
    IntArray,
    RunId,
    SamplingParams,
    SessionId,
    Tenant,
    TopLogprobs,
)
from openmint.wire.encode import SampleAnswer, SparseLayout

CLONE_STRIDE = 1_000_000_000
"""A cloned client's seq_ids start at its number times this."""


@dataclass(eq=False, slots=True)
class Sampler:
    """A sampling session: which weights its samples run on."""

    sampler_id: str
    tenant: Tenant
    session_id: SessionId
    base: BaseInfo
    revision: Digest | None
    model_path: str | None
    inflight_run: RunId | None = None
    """Set when later in-flight saves of that run replace `revision`."""
    num_clones: int = 0
    feeds: dict[int, Feed] = field(default_factory=dict)
    running: set[asyncio.Task[None]] = field(default_factory=set)

    def feed_of(self, clone: int) -> Feed:
        return self.feeds.setdefault(clone, Feed())


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One `asample`, decoded; None where the base decides."""

    prompt_T: IntArray
    num_samples: int = 1
    max_tokens: int | None = None
    seed: int | None = None
    stop_token_ids: tuple[int, ...] | None = None
    """None: the base's end tokens."""
    stop_strings: tuple[str, ...] = ()
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs_NK: IntArray | None = None
    prompt_alt_tokens_k: int = 0


class Sampling:
    """The samplers of this gateway."""

    def __init__(
        self,
        catalog: Catalog,
        workers: Workers,
        futures: Futures,
        sessions: Sessions,
        limits: Limits,
        *,
        records_routes: bool,
    ) -> None:
        self._catalog, self._workers, self._futures = catalog, workers, futures
        self._limits, self._records_routes = limits, records_routes
        self._sessions = sessions
        self._samplers: dict[str, Sampler] = {}
        sessions.on_close(self.close_session)

    async def create(
        self,
        tenant: Tenant,
        session_id: SessionId,
        sampling_seq: int,
        base_model: str | None,
        model_path: str | None,
    ) -> Sampler:
        """A sampler bound to a base or to a sampler checkpoint; the same one for a retry.

        Raises NotFound for an unknown base or path, InvalidRequest, Gone for a closed session.
        """
        base, revision = self.bind(tenant, base_model, model_path)
        sampler_id = f"{session_id}:sample:{sampling_seq}"
        sampler = Sampler(sampler_id, tenant, session_id, base, revision, model_path)
        return await self.add(sampler)

    def bind(
        self, tenant: Tenant, base_model: str | None, model_path: str | None
    ) -> tuple[BaseInfo, Digest | None]:
        """The base and revision that a base name and a `tinker://` path mean now."""
        if model_path is None:
            if base_model is None:
                raise InvalidRequest("send base_model, model_path, or both")
            return self._workers.by_name(base_model).base, None
        checkpoint = readable_checkpoint(self._catalog, tenant, model_path)
        if checkpoint.segment != "sampler_weights":
            raise InvalidRequest(
                f"{model_path} is a {checkpoint.segment} checkpoint; sample from a sampler_weights "
                "one, made by save_weights_for_sampler"
            )
        base = self._workers.by_digest(checkpoint.base_digest).base
        if base_model and self._workers.by_name(base_model).base.digest != base.digest:
            raise InvalidRequest(f"{model_path} belongs to base {base.name}, not {base_model}")
        return base, checkpoint.digest

    async def add(self, sampler: Sampler) -> Sampler:
        """Register a sampler, durably; the one that is there for the same id and content.

        Raises Conflict when the id is bound to something else.
        """
        self._sessions.touch(sampler.tenant, sampler.session_id)
        record = await asyncio.to_thread(
            self._catalog.add_sampler,
            sampler.tenant,
            sampler.sampler_id,
            session_id=sampler.session_id,
            base=sampler.base,
            revision=sampler.revision,
            model_path=sampler.model_path,
            inflight_run=sampler.inflight_run,
        )
        # A retry stays with what the first attempt was bound to.
        sampler.revision = record.revision
        return self._samplers.setdefault(sampler.sampler_id, sampler)

    def get(self, tenant: Tenant, sampler_id: str) -> Sampler:
        """The tenant's sampler. Raises NotFound."""
        sampler = self._samplers.get(sampler_id)
        if sampler is None:
            record = self._catalog.sampler(tenant, sampler_id)
            base = self._workers.by_digest(record.base_digest).base
            sampler = Sampler(
                sampler_id,
                tenant,
                record.session_id,
                base,
                record.revision,
                record.model_path,
                record.inflight_run,
            )
            if self._sessions.record(tenant, record.session_id).finished_at is None:
                self._samplers[sampler_id] = sampler
        if sampler.tenant != tenant:
            raise NotFound(f"no sampling session {sampler_id[:200]!r}")
        return sampler

    async def publish_inflight(self, run_id: RunId, revision: Digest) -> None:
        """Point the run's in-flight samplers at newer weights, durably."""
        await asyncio.to_thread(self._catalog.move_samplers, run_id, revision)
        for sampler in self._samplers.values():
            if sampler.inflight_run == run_id:
                sampler.revision = revision

    def sample(
        self,
        sampler: Sampler,
        seq: int | None,
        request: SampleRequest,
        target_layout: SparseLayout | None = None,
    ) -> ResultFuture:
        """The future of a sample; the same one for the same seq_id and request.

        Raises InvalidRequest with the limit, Gone for a closed session, BodyMismatch.
        """
        check_sample(request, sampler.base)
        self._sessions.touch(sampler.tenant, sampler.session_id)
        key = ("sample", sampler.sampler_id, secrets.token_hex(8) if seq is None else seq)
        content = fingerprint(request, target_layout)
        if known := self._futures.existing(key, content):
            return known
        self._limits.check_sample(sampler.tenant, sampler.revision)
        future = self._futures.open(sampler.tenant, "sample", key, content)
        work = replace(sample_work(sampler, request), routes=self._records_routes)
        feed = sampler.feed_of((seq or 0) // CLONE_STRIDE)

        async def run() -> None:
            await future.settle(self._run(sampler, request, work, target_layout))
            feed.append(future.request_id, failed=future.error is not None)

        future.task = asyncio.create_task(run())
        sampler.running.add(future.task)
        future.task.add_done_callback(sampler.running.discard)
        return future

    async def _run(
        self,
        sampler: Sampler,
        request: SampleRequest,
        work: SampleWork,
        layout: SparseLayout | None,
    ) -> object:
        client = self._workers.to_sample(sampler.base.digest, work.revision)
        result = await client.call(work)
        assert isinstance(result, SampleResult)
        return SampleAnswer(_last_n_only(result, request.prompt_logprobs_last_n), layout)

    def forget(self, sampler: Sampler, request_ids: list[str]) -> None:
        """Drop results that the client says it has; ids of anything else are ignored."""
        for request_id in request_ids:
            try:
                future = self._futures.get(sampler.tenant, request_id)
            except RequestError:
                continue
            if future.key[:2] == ("sample", sampler.sampler_id) and future.done.is_set():
                self._futures.forget(future)

    async def close_session(self, tenant: Tenant, session_id: SessionId) -> None:
        """Forget the session's samplers; their samples in flight are given up."""
        for sampler in [s for s in self._samplers.values() if s.session_id == session_id]:
            del self._samplers[sampler.sampler_id]
            for task in sampler.running:
                task.cancel()


def check_sample(request: SampleRequest, base: BaseInfo) -> None:
    """Raises InvalidRequest, naming the limit, unless the base can run the request."""
    num_prompt = request.prompt_T.size
    if num_prompt == 0:
        raise InvalidRequest("prompt is empty; send at least one token")
    if num_prompt >= base.context_length:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens; the context of {base.name} holds "
            f"{base.context_length} with the completion, so a prompt has at most "
            f"{base.context_length - 1}"
        )
    checks.check_tokens(request.prompt_T, "prompt", base)
    if not 1 <= request.num_samples <= checks.MAX_SAMPLES:
        raise InvalidRequest(
            f"num_samples must be 1 to {checks.MAX_SAMPLES}, got {request.num_samples}"
        )
    _check_drawing(request, base)
    _check_logprobs(request, base)


def _check_drawing(request: SampleRequest, base: BaseInfo) -> None:
    num_prompt, max_tokens = request.prompt_T.size, request.max_tokens
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {max_tokens}")
    if max_tokens is not None and num_prompt + max_tokens > base.context_length:
        raise InvalidRequest(
            f"prompt ({num_prompt}) plus max_tokens ({max_tokens}) is "
            f"{num_prompt + max_tokens} tokens; the context of {base.name} holds "
            f"{base.context_length}; max_tokens may be at most {base.context_length - num_prompt}"
        )
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        raise InvalidRequest(f"temperature must be 0 or more, got {request.temperature}")
    if not 0 < request.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, got {request.top_p}")
    if request.top_k != -1 and request.top_k < 1:
        raise InvalidRequest(f"top_k must be -1 (no limit) or at least 1, got {request.top_k}")
    if request.seed is not None and not 0 <= request.seed < 1 << 63:
        raise InvalidRequest(f"seed must be 0 to 2^63 - 1, got {request.seed}")
    stops = (*(request.stop_token_ids or ()), *request.stop_strings)
    if len(stops) > checks.MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} entries; the limit is {checks.MAX_STOPS}")
    if "" in request.stop_strings:
        raise InvalidRequest("stop holds an empty string; send [] for no stop at all")
    for token in request.stop_token_ids or ():
        if not 0 <= token < base.vocab_size:
            raise InvalidRequest(f"stop: token id {token} is outside 0..{base.vocab_size - 1}")


def _check_logprobs(request: SampleRequest, base: BaseInfo) -> None:
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        wanted = getattr(request, name)
        if not 0 <= wanted <= checks.MAX_TOP_LOGPROBS:
            raise InvalidRequest(f"{name} must be 0 to {checks.MAX_TOP_LOGPROBS}, got {wanted}")
    num_scored = request.prompt_T.size - 1
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and not (request.prompt_logprobs and 1 <= last_n <= num_scored):
        raise InvalidRequest(
            f"prompt_logprobs_last_n must be 1 to {num_scored} (the prompt's tokens after the "
            f"first) and needs prompt_logprobs, got {last_n}"
        )
    if (targets_NK := request.target_prompt_logprobs_NK) is None:
        return
    if targets_NK.ndim != 2 or targets_NK.shape[0] != num_scored:
        raise InvalidRequest(
            f"target_prompt_logprobs has shape {list(targets_NK.shape)}; "
            f"[{num_scored}, K] is wanted, a row for each prompt token after the first"
        )
    if not 1 <= targets_NK.shape[1] <= checks.MAX_TARGETS:
        raise InvalidRequest(f"target_prompt_logprobs takes 1 to {checks.MAX_TARGETS} columns")
    asked_NK = np.where(targets_NK == -1, 0, targets_NK)
    checks.check_tokens(asked_NK, "target_prompt_logprobs", base)


def sample_work(sampler: Sampler, request: SampleRequest) -> SampleWork:
    """The worker's command, with everything resolved; an absent seed is drawn here, once."""
    base = sampler.base
    stop_ids = base.eos_token_ids if request.stop_token_ids is None else request.stop_token_ids
    params = SamplingParams(
        max_tokens=request.max_tokens or base.context_length - request.prompt_T.size,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=secrets.randbits(62) if request.seed is None else request.seed,
        stop_token_ids=stop_ids,
        stop_strings=request.stop_strings,
    )
    return SampleWork(
        tenant=sampler.tenant,
        revision=sampler.revision,
        prompt_T=request.prompt_T,
        params=params,
        num_samples=request.num_samples,
        prompt_logprobs=request.prompt_logprobs,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        target_prompt_logprobs_NK=request.target_prompt_logprobs_NK,
        prompt_alternatives=request.prompt_alt_tokens_k,
    )


def _last_n_only(result: SampleResult, last_n: int | None) -> SampleResult:
    """The result with nothing scored before the prompt's last n tokens."""
    if last_n is None:
        return result
    prompt_T, top = result.prompt_logprobs_T, result.topk_prompt_logprobs
    return replace(
        result,
        prompt_logprobs_T=None if prompt_T is None else _blank(prompt_T, last_n, math.nan),
        topk_prompt_logprobs=None
        if top is None
        else TopLogprobs(top.token_ids_NK, _blank(top.logprobs_NK, last_n, -math.inf)),
    )


def _blank(values: FloatArray, last_n: int, blank: float) -> FloatArray:
    kept = values.copy()
    kept[: len(kept) - last_n] = blank
    return kept
