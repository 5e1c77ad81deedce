"""The sampler's choices instead of the trainer's own, token by token, and how far they differ.

Shapes: T tokens of a packed batch, N tokens of a datum, K experts of a token, C chosen keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from openmint.engine.route_record import RouteRecord
from openmint.layers.sparse import NONE
from openmint.models.model import RouteShape
from openmint.types import Datum, IntArray


@dataclass(frozen=True, slots=True)
class RouteCounts:
    """Of the tokens of one work."""

    recorded: int = 0
    """That have a record."""
    missing: int = 0
    """That have none, in sequences that have some."""
    unrecorded: int = 0
    """Of sequences of which nothing is recorded: they were not sampled here."""
    choices: int = 0
    """Of experts, by tokens that have a record."""
    out_of_route: int = 0
    """Experts that computed and are not in the record."""
    own_differs: int = 0
    """Experts that the router itself would have taken and are not in the record."""

    @property
    def metrics(self) -> dict[str, float]:
        """Keys are `name:reduction`, as the Tinker SDK combines chunks."""
        share = 1.0 / max(1, self.choices)
        return {
            "replay_recorded_tokens:sum": float(self.recorded),
            "replay_missing_tokens:sum": float(self.missing),
            "replay_unrecorded_tokens:sum": float(self.unrecorded),
            "out_of_route_ratio:mean": self.out_of_route * share,
            "own_route_differs_ratio:mean": self.own_differs * share,
        }


def total(counts: Iterable[RouteCounts]) -> RouteCounts:
    return RouteCounts(*(sum(column) for column in zip(*map(astuple, counts), strict=True)))


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A datum's record, which is of its first tokens; None: it has none."""

    record: RouteRecord | None
    count: int
    num_tokens: int
    is_forced: bool

    @staticmethod
    def of(datum: Datum, shape: RouteShape) -> _Recorded:
        routes, num_tokens = datum.routes, len(datum.tokens_N)
        if routes is None:
            return _Recorded(None, 0, num_tokens, False)
        record = RouteRecord.decode(routes.record, shape)
        return _Recorded(record, routes.num_tokens, num_tokens, routes.is_forced)

    def experts(self, shape: RouteShape) -> IntArray:
        """`[N, L, K]`, NONE where nothing is recorded."""
        experts_NLK = np.full((self.num_tokens, shape.num_layers, shape.num_chosen), NONE)
        if self.record is not None:
            experts_NLK[: self.count] = self.record.experts_NLK[: self.count]
        return experts_NLK

    def keys(self, indexer: int, num_keys: int) -> IntArray:
        """`[N, C]`, likewise; of a record that isn't repeated none either, for nothing reads
        them."""
        keys_NC = np.full((self.num_tokens, num_keys), NONE)
        if self.record is not None and self.is_forced:
            keys_NC[: self.count] = self.record.keys(indexer)[: self.count]
        return keys_NC


class Replay:
    """The records of one packed batch; stands where `layers.routes.Routes` does."""

    def __init__(self, data: Sequence[Datum], shape: RouteShape, device: torch.device) -> None:
        self._recorded = [_Recorded.of(datum, shape) for datum in data]
        lengths = [each.num_tokens for each in self._recorded]
        experts_TLK = np.concatenate([each.experts(shape) for each in self._recorded])
        self._experts_TLK = torch.from_numpy(experts_TLK).to(device)
        self._is_recorded_T = torch.cat(
            [torch.arange(each.num_tokens) < each.count for each in self._recorded]
        ).to(device)
        self._own_differs_T = torch.zeros(len(experts_TLK), dtype=torch.int64, device=device)
        self._out_T = torch.zeros_like(self._own_differs_T)
        forced = [each.is_forced for each in self._recorded]
        forced_T = torch.tensor(forced).repeat_interleave(torch.tensor(lengths)).to(device)
        self._repeats_T1 = (self._is_recorded_T & forced_T)[:, None]
        self._num_keys = shape.num_keys
        self._position_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        self._lengths, self._num_choices = lengths, shape.num_layers * shape.num_chosen

    def experts(self, layer: int, own_TK: Tensor) -> Tensor:
        recorded_TK = self._experts_TLK[:, layer]
        taken_TK = torch.where(self._repeats_T1, recorded_TK, own_TK)
        for chosen_TK, differs_T in ((own_TK, self._own_differs_T), (taken_TK, self._out_T)):
            is_in_TK = (chosen_TK[:, :, None] == recorded_TK[:, None, :]).any(-1)
            differs_T += (~is_in_TK).sum(1) * self._is_recorded_T
        return taken_TK

    def keys(self, layer: int, own_TC: Tensor | None) -> Tensor | None:
        if own_TC is None:
            return None
        keys_TC = np.concatenate([each.keys(layer, self._num_keys) for each in self._recorded])
        recorded_TC = torch.from_numpy(keys_TC).to(own_TC.device)
        # A record without positions means all of them, which then are no more than may be chosen.
        upto_C = torch.arange(self._num_keys, device=own_TC.device)
        all_TC = upto_C.where(upto_C <= self._position_T[:, None], NONE)
        saw_all_T1 = (recorded_TC == NONE).all(1, keepdim=True)
        recorded_TC = torch.where(saw_all_T1, all_TC, recorded_TC)
        return torch.where(self._repeats_T1, recorded_TC, own_TC)

    def counts(self, index: int) -> RouteCounts:
        """Of one datum, after the forward pass."""
        start = sum(self._lengths[:index])
        rows = slice(start, start + self._lengths[index])
        recorded = int(self._is_recorded_T[rows].sum())
        rest = self._lengths[index] - recorded
        return RouteCounts(
            recorded=recorded,
            missing=rest if recorded else 0,
            unrecorded=0 if recorded else rest,
            choices=recorded * self._num_choices,
            out_of_route=int(self._out_T[rows].sum()),
            own_differs=int(self._own_differs_T[rows].sum()),
        )
