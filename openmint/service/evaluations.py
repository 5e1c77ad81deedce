"""Evaluations: a task run on one pinned revision, in the background, with its result kept.

The record exists from the start; what a process leaves running when it ends is marked as failed at
the next start. Lives on the event loop; writes run in threads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Evaluation, TaskRecord
from openmint.errors import InvalidRequest, OpenMintError, Overloaded
from openmint.evaluate.interval import wilson_interval
from openmint.evaluate.run import Progress, run_task
from openmint.evaluate.task import (
    EvaluationItem,
    EvaluationTask,
    encode_task,
    parse_task,
    task_digest,
)
from openmint.service.completions import Completions
from openmint.service.prewarming import Prewarming
from openmint.service.targets import Target
from openmint.types import Tenant
from openmint.wire.openai import Drawing

log = structlog.get_logger(__name__)

MAX_RUNNING_PER_TENANT = 4
REWRITE_SECONDS = 1.0
"""When a failed write of a result is tried once more."""


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """Score `model` on the first `num_items` items of a task; None means all of them."""

    model: str
    task: Mapping[str, Any] | str
    num_items: int | None
    seed: int
    temperature: float


@dataclass(eq=False, slots=True)
class RunningEvaluation:
    progress: Progress
    job: asyncio.Task[None]


class Evaluations:
    """The evaluations of this gateway."""

    def __init__(self, catalog: Catalog, completions: Completions, prewarming: Prewarming) -> None:
        self._catalog, self._completions, self._prewarming = catalog, completions, prewarming
        self._running: dict[int, RunningEvaluation] = {}
        self._num_held: Counter[Tenant] = Counter()
        """Evaluations of a tenant that run or are about to: starting one takes its time."""

    async def start(self, tenant: Tenant, request: EvaluationRequest) -> Evaluation:
        """A running evaluation on what `request.model` names now; its record is durable.

        Raises NotFound for the model or task, InvalidRequest, Overloaded when the tenant has too
        many running. A retry starts another evaluation.
        """
        if self._num_held[tenant] >= MAX_RUNNING_PER_TENANT:
            limit = f"{MAX_RUNNING_PER_TENANT} evaluations of a tenant run at once"
            raise Overloaded(f"{limit}; wait for one to finish", retry_after_seconds=5.0)
        self._num_held[tenant] += 1
        try:
            return await self._start(tenant, request)
        except BaseException:
            self._num_held[tenant] -= 1
            raise

    async def _start(self, tenant: Tenant, request: EvaluationRequest) -> Evaluation:
        target = self._completions.targets.resolve(tenant, request.model)
        _own_policy(tenant, target)
        self._prewarming.before_evaluation(tenant, target)
        task = await asyncio.to_thread(self._task, tenant, request.task)
        num_items = request.num_items or len(task.items)
        if num_items > len(task.items):
            raise InvalidRequest(f"n is {num_items}; task {task.name} has {len(task.items)} items")
        record = await asyncio.to_thread(self._record, tenant, target, task, request, num_items)
        progress = Progress(num_items)
        job = asyncio.create_task(self._run(tenant, record, target, task, request, progress))
        self._running[record.evaluation_id] = RunningEvaluation(progress, job)
        return record

    def expect(self, tenant: Tenant, model: str) -> None:
        """It will be evaluated as soon as there is room; its load needn't wait for that.

        Raises NotFound for the model.
        """
        target = self._completions.targets.resolve(tenant, model)
        self._prewarming.before_evaluation(tenant, target)

    def get(self, tenant: Tenant, evaluation_id: int) -> tuple[Evaluation, Progress | None]:
        """The record, and the progress while it runs. Raises NotFound."""
        record = self._catalog.evaluation(tenant, evaluation_id)
        running = self._running.get(evaluation_id)
        return record, running.progress if running else None

    async def store_task(self, tenant: Tenant, raw: object) -> TaskRecord:
        """Keep a task under its name and digest; the same task again changes nothing."""
        return await asyncio.to_thread(self._store_task, tenant, raw)

    def fail_abandoned(self) -> None:
        """Mark as failed what an earlier process left running; call it once, at the start."""
        self._catalog.fail_running_evaluations("the service stopped while this ran")

    async def close(self) -> None:
        """Stop what runs; each is recorded as failed."""
        jobs = [running.job for running in self._running.values()]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    def _task(self, tenant: Tenant, given: Mapping[str, Any] | str) -> EvaluationTask:
        """A task that is given whole, or the stored one of that name or digest.

        Not for the event loop: a large task takes seconds to parse.
        """
        if not isinstance(given, str):
            return parse_task(given)
        return parse_task(self._catalog.task(tenant, given).body)

    def _store_task(self, tenant: Tenant, raw: object) -> TaskRecord:
        return self._put_task(tenant, parse_task(raw))

    def _put_task(self, tenant: Tenant, task: EvaluationTask) -> TaskRecord:
        return self._catalog.put_task(tenant, task.name, task_digest(task), encode_task(task))

    def _record(
        self,
        tenant: Tenant,
        target: Target,
        task: EvaluationTask,
        request: EvaluationRequest,
        num_items: int,
    ) -> Evaluation:
        self._put_task(tenant, task)
        return self._catalog.start_evaluation(
            tenant,
            policy_name=_own_policy(tenant, target),
            digest=target.revision,
            base_name=target.base.name,
            task_name=task.name,
            task_digest=task_digest(task),
            seed=request.seed,
            num_items=num_items,
            sampling={"temperature": request.temperature, "max_tokens": task.max_tokens},
        )

    async def _run(
        self,
        tenant: Tenant,
        record: Evaluation,
        target: Target,
        task: EvaluationTask,
        request: EvaluationRequest,
        progress: Progress,
    ) -> None:
        evaluation_id = record.evaluation_id
        drawing = Drawing(
            n=1,
            seed=0,
            stop=task.stop,
            max_tokens=task.max_tokens,
            temperature=request.temperature,
            top_p=1.0,
            logprobs=False,
            num_top_logprobs=0,
            stream=False,
            include_usage=False,
        )

        async def ask(index: int, item: EvaluationItem) -> str:
            own = replace(drawing, seed=request.seed + index)
            return await self._ask(tenant, target, request.model, item, own)

        try:
            await run_task(task, ask, progress)
        except asyncio.CancelledError:
            await self._fail(tenant, evaluation_id, "the service stopped while this ran")
            raise
        except OpenMintError as error:
            await self._fail(tenant, evaluation_id, error.message)
        except Exception as error:
            log.error("evaluation_failed", evaluation_id=evaluation_id, exc_info=error)
            await self._fail(tenant, evaluation_id, "unexpected failure; see the service's log")
        else:
            await self._finish(tenant, evaluation_id, progress)
        finally:
            self._running.pop(evaluation_id, None)
            self._num_held[tenant] -= 1

    async def _ask(
        self, tenant: Tenant, target: Target, model: str, item: EvaluationItem, drawing: Drawing
    ) -> str:
        if isinstance(item.prompt, str):
            prompts = (item.prompt,)
            admit = self._completions.admit_prompts(tenant, target, model, prompts, drawing)
        else:
            messages = [{"role": role, "content": content} for role, content in item.prompt]
            admit = self._completions.admit_chat(tenant, target, model, messages, drawing)
        choices, _ = await (await admit).whole()
        return choices[0].text

    async def _finish(self, tenant: Tenant, evaluation_id: int, progress: Progress) -> None:
        outcomes = [progress.outcomes[i] for i in range(progress.num_items)]
        finish = partial(self._catalog.finish_evaluation, tenant, evaluation_id, outcomes)
        if not await _written(finish, evaluation_id):
            right = f"{progress.num_right} right"
            message = f"the score, {right}, could not be written; see the service's log"
            await self._fail(tenant, evaluation_id, message)

    async def _fail(self, tenant: Tenant, evaluation_id: int, message: str) -> None:
        fail = partial(self._catalog.fail_evaluation, tenant, evaluation_id, message)
        await _written(fail, evaluation_id)


async def _written(write: Callable[[], Evaluation], evaluation_id: int) -> bool:
    """Whether `write` succeeded, at once or a little later; the log has every failure."""
    for wait_seconds in (0.0, REWRITE_SECONDS):
        await asyncio.sleep(wait_seconds)
        try:
            await asyncio.to_thread(write)
        except Exception as error:
            log.error("evaluation_not_recorded", evaluation_id=evaluation_id, exc_info=error)
        else:
            return True
    return False


def interval_95(evaluation: Evaluation) -> tuple[float, float] | None:
    """The Wilson interval of a finished evaluation's score."""
    if evaluation.status != "finished":
        return None
    return wilson_interval(evaluation.num_correct, evaluation.num_items)


def _own_policy(tenant: Tenant, target: Target) -> str | None:
    """The policy that the score belongs to; None for a bare base. Raises InvalidRequest."""
    if target.revision is None:
        return None
    owner, _, name = (target.policy or "").partition("/")
    if owner != tenant:
        raise InvalidRequest("only a base or a policy of one's own can be evaluated")
    return name
