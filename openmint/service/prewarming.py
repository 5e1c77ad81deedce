"""Brings revisions into memory before anybody asks for them: on request, when an alias moves, and
ahead of an evaluation.

Lives on the event loop.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from openmint.errors import InvalidRequest, OpenMintError
from openmint.scheduler.work import Prewarm
from openmint.service.background import Background
from openmint.service.completions import together
from openmint.service.pinning import Pinning
from openmint.service.targets import Target, Targets
from openmint.types import Digest, Tenant

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Prewarming:
    targets: Targets
    pinning: Pinning
    _background: Background = field(default_factory=Background)

    async def prewarm(
        self, tenant: Tenant, models: Sequence[str], load_seconds: float | None
    ) -> list[Digest]:
        """The revisions of these models, in memory now. They are loaded after what samples want,
        and leave like any other when their place is worth more. A retry is harmless.

        Raises NotFound for a model, InvalidRequest for a base, Overloaded with the time after which
        to ask again when they can't be there in time.
        """
        targets = [self.targets.resolve(tenant, model) for model in models]
        return await together([_load(tenant, target, load_seconds) for target in targets])

    def after_move(self, tenant: Tenant, policy: str, digest: Digest) -> None:
        """What an alias names now is likely to be asked for soon, and pins follow it."""
        self.pinning.follow()
        model = f"{tenant}/{policy}@{digest}"
        self._begin(self._load_named(tenant, model), model)

    def before_evaluation(self, tenant: Tenant, target: Target) -> None:
        """An evaluation is to sample from this. A base is in memory always."""
        if target.revision is not None:
            model = f"{target.policy}@{target.revision}"
            self._begin(_load(tenant, target, None), model)

    def _begin(self, load: Coroutine[Any, Any, Digest], model: str) -> None:
        self._background.start(_quietly(load, model))

    async def _load_named(self, tenant: Tenant, model: str) -> Digest:
        return await _load(tenant, self.targets.resolve(tenant, model), None)


async def _quietly(load: Coroutine[Any, Any, Digest], model: str) -> None:
    try:
        await load
    except OpenMintError as error:  # who asks for it has it loaded then
        log.info("not_prewarmed", model=model, error=error.message)


async def _load(tenant: Tenant, target: Target, load_seconds: float | None) -> Digest:
    if target.revision is None:
        raise InvalidRequest(f"base {target.base.name} is in memory always; name a revision")
    await target.client.call(Prewarm(tenant, target.revision, load_seconds))
    return target.revision
