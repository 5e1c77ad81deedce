"""Several ranks' engines as one: the first rank is asked, the others repeat every call.

All ranks then run the same steps in the same order, which is what their collectives need. A call
that is refused is refused by all of them. Any other failure may have left ranks in different steps,
so the first rank gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import torch

from openmint.engine.engine import Engine
from openmint.engine.formats import MOST_LAYOUTS
from openmint.engine.plan import ChunkOutcome, MicroBatch, SampleBatch
from openmint.engine.runs import RunSnapshot, Update
from openmint.errors import OpenMintError
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.types import (
    AdamParams,
    AnyArray,
    Datum,
    Digest,
    FloatArray,
    IntArray,
    LoraSpec,
    LossSpec,
    RunId,
)

Call = tuple[str, tuple[Any, ...]]
"""A method of `FollowingEngine` and its arguments."""


@dataclass(frozen=True, slots=True)
class SentWeights:
    """Whole adapter weights on their way to another rank."""

    spec: LoraSpec
    revision: Digest | None
    raw: AnyArray
    """Their bytes."""

    @staticmethod
    def of(weights: AdapterWeights) -> SentWeights:
        raw = weights.flat_P.detach().cpu().contiguous().view(torch.uint8).numpy()
        return SentWeights(weights.spec, weights.revision, raw)


class LeadingEngine:
    """The engines of all ranks, as the scheduler sees them; implements `EngineProtocol`."""

    def __init__(
        self,
        engine: Engine,
        tell: Callable[[Call], None],
        give_up: Callable[[Exception], NoReturn],
    ) -> None:
        """`tell` sends a call to each other rank."""
        self._engine, self._tell, self._give_up = engine, tell, give_up
        self.base, self.num_pages = engine.base, engine.num_pages

    @property
    def num_runs(self) -> int:
        return self._engine.num_runs

    @property
    def training_bytes(self) -> int:
        return self._engine.training_bytes

    def slot_bytes(self, weights: AdapterWeights) -> int:
        return self._engine.slot_bytes(weights)

    def routes(self, pages: Sequence[int], num_tokens: int) -> bytes:
        return self._engine.routes(pages, num_tokens)

    def create_run(self, run_id: RunId, spec: LoraSpec, seed: int) -> int:
        return int(self._together("create_run", run_id, spec, seed))

    def restore_run(self, run_id: RunId, snapshot: RunSnapshot) -> int:
        return int(self._together("restore_run", run_id, snapshot))

    def drop_run(self, run_id: RunId) -> None:
        self._together("drop_run", run_id)

    def snapshot_run(self, run_id: RunId) -> RunSnapshot:
        snapshot: RunSnapshot = self._together("snapshot_run", run_id)
        return snapshot

    def export_run(self, run_id: RunId) -> tuple[AdapterWeights, int]:
        exported: tuple[AdapterWeights, int] = self._together("export_run", run_id)
        return exported

    def read_gradient(self, run_id: RunId, read_into: Callable[[memoryview], None]) -> None:
        whole_P = np.empty(self._engine.runs[run_id].shard.whole.num_params, np.float32)
        read_into(whole_P.data)
        self._tell(("read_gradient", (run_id, whole_P)))
        self._run(lambda: self._engine.read_gradient(run_id, _reader(whole_P)))

    def prepare_update(self, run_id: RunId, adam: AdamParams) -> Update:
        update: Update = self._together("prepare_update", run_id, adam)
        return update

    def publish_update(self, run_id: RunId, update: Update) -> None:
        self._tell(("publish_update", (run_id,)))
        self._run(lambda: self._engine.publish_update(run_id, update))

    def discard_update(self, run_id: RunId, update: Update) -> None:
        self._tell(("discard_update", (run_id,)))
        self._run(lambda: self._engine.discard_update(run_id, update))

    def open_train(
        self,
        work_id: int,
        run_id: RunId,
        data: tuple[Datum, ...],
        loss: LossSpec,
        forward_only: bool,
    ) -> None:
        self._together("open_train", work_id, run_id, data, loss, forward_only)

    def train(self, micro_batch: MicroBatch) -> None:
        self._together("train", micro_batch)

    def close_train(self, work_id: int) -> tuple[tuple[FloatArray, ...], dict[str, float]]:
        closed: tuple[tuple[FloatArray, ...], dict[str, float]]
        closed = self._together("close_train", work_id)
        return closed

    def abandon_train(self, work_id: int) -> None:
        self._together("abandon_train", work_id)

    def attach(self, revision: Digest, weights: AdapterWeights) -> None:
        self._tell(("attach", (revision, SentWeights.of(weights))))
        self._run(lambda: self._engine.attach(revision, weights))

    def detach(self, revision: Digest) -> None:
        self._together("detach", revision)

    def sample(self, batch: SampleBatch) -> list[ChunkOutcome]:
        outcomes: list[ChunkOutcome] = self._together("sample", batch)
        return outcomes

    def score(self, weights: AdapterWeights, tokens_T: IntArray) -> tuple[FloatArray, bool]:
        self._tell(("score", (SentWeights.of(weights), tokens_T)))
        scored: tuple[FloatArray, bool] = self._run(lambda: self._engine.score(weights, tokens_T))
        return scored

    def _together(self, name: str, *args: Any) -> Any:
        """The result here of a call that the others' engines take as it is."""
        self._tell((name, args))
        return self._run(lambda: getattr(self._engine, name)(*args))

    def _run(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OpenMintError:
            raise
        except Exception as error:  # the ranks' edge: who knows where the others are
            self._give_up(error)


class FollowingEngine:
    """The engine of another rank: repeats what the first one does, and answers nobody."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._updates: dict[RunId, Update] = {}
        self._layout = lru_cache(MOST_LAYOUTS)(
            lambda spec: AdapterLayout(spec, engine.base.targets_of(spec))
        )

    def repeat(self, call: Call) -> None:
        """Do what the first rank does. What is refused here is refused, and answered, there."""
        name, args = call
        with suppress(OpenMintError):
            getattr(self if hasattr(self, name) else self._engine, name)(*args)

    def read_gradient(self, run_id: RunId, whole_P: FloatArray) -> None:
        self._engine.read_gradient(run_id, _reader(whole_P))

    def prepare_update(self, run_id: RunId, adam: AdamParams) -> None:
        self._updates[run_id] = self._engine.prepare_update(run_id, adam)

    def publish_update(self, run_id: RunId) -> None:
        self._engine.publish_update(run_id, self._updates.pop(run_id))

    def discard_update(self, run_id: RunId) -> None:
        self._engine.discard_update(run_id, self._updates.pop(run_id))

    def attach(self, revision: Digest, weights: SentWeights) -> None:
        self._engine.attach(revision, self._received(weights))

    def score(self, weights: SentWeights, tokens_T: IntArray) -> None:
        self._engine.score(self._received(weights), tokens_T)

    def _received(self, sent: SentWeights) -> AdapterWeights:
        flat_P = torch.from_numpy(sent.raw).view(self._engine.dtype)
        return AdapterWeights(self._layout(sent.spec), flat_P, sent.revision)


def _reader(whole_P: FloatArray) -> Callable[[memoryview], None]:
    def read_into(memory: memoryview) -> None:
        np.frombuffer(memory, np.float32)[:] = whole_P

    return read_into
