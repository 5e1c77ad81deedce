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
from openmint.types import AnyArray, Datum


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


class Replay:
    """The records of one packed batch; stands where `layers.routes.Routes` does."""

    def __init__(self, data: Sequence[Datum], shape: RouteShape, device: torch.device) -> None:
        records = [_of_datum(datum, shape) for datum in data]
        experts_TLK = np.concatenate([experts for experts, _ in records])
        self._keys_TIC = torch.from_numpy(np.concatenate([keys for _, keys in records])).to(device)
        self._experts_TLK = torch.from_numpy(experts_TLK).to(device)
        known = [_num_recorded(datum) for datum in data]
        self._is_recorded_T = torch.cat(
            [torch.arange(len(d.tokens_N)) < count for d, count in zip(data, known, strict=True)]
        ).to(device)
        self._own_differs_T = torch.zeros(len(experts_TLK), dtype=torch.int64, device=device)
        self._out_T = torch.zeros_like(self._own_differs_T)
        lengths = [len(datum.tokens_N) for datum in data]
        forced = [datum.routes is not None and datum.routes.is_forced for datum in data]
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
        recorded_TC = self._keys_TIC[:, layer]
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


def _num_recorded(datum: Datum) -> int:
    return 0 if datum.routes is None else datum.routes.num_tokens


def _of_datum(datum: Datum, shape: RouteShape) -> tuple[AnyArray, AnyArray]:
    """Experts `[N, L, K]` and keys `[N, I, C]` of each token, NONE where nothing is recorded."""
    num_tokens = len(datum.tokens_N)
    experts_NLK = np.full((num_tokens, shape.num_layers, shape.num_chosen), NONE)
    keys_NIC = np.full((num_tokens, shape.num_indexers, shape.num_keys), NONE)
    if datum.routes is None:
        return experts_NLK, keys_NIC
    record, count = RouteRecord.decode(datum.routes.record, shape), _num_recorded(datum)
    experts_NLK[:count] = record.experts_NLK[:count]
    keys_NIC[:count] = record.keys_NIC[:count]
    return experts_NLK, keys_NIC
