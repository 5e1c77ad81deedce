"""Data of policy losses with the routes that their tokens took when they were sampled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from openmint.config import ServiceConfig
from openmint.service.route_records import RouteRecords
from openmint.types import Datum, Digest, LossSpec, Tenant


class Replaying:
    """Joins what is trained to what was recorded; see `service.replay`."""

    def __init__(self, config: ServiceConfig, records: RouteRecords) -> None:
        self._how, self._records = config.replay, records

    def routed(
        self, tenant: Tenant, base: Digest, data: tuple[Datum, ...], loss: LossSpec
    ) -> tuple[Datum, ...]:
        """The data with what is recorded of them, where the loss compares with the sampler."""
        if self._how == "off" or not len(self._records) or "advantages" not in data[0].inputs:
            return data
        return tuple(self._with_routes(tenant, base, datum) for datum in data)

    def _with_routes(self, tenant: Tenant, base: Digest, datum: Datum) -> Datum:
        found = self._records.find(tenant, base, datum.tokens_N)
        counted_N = np.flatnonzero(datum.inputs["advantages"])
        first = int(counted_N[0]) if len(counted_N) else 0
        # A prompt in common with a sequence from here doesn't make it one from here.
        if found is None or found.num_tokens <= first:
            return datum
        return replace(datum, routes=replace(found, is_forced=self._how == "mask"))
