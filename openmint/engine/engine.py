"""The engine: sole owner of device memory. Called by one thread, the worker's main loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from openmint.config import WorkerConfig
from openmint.engine.lanes import Lanes
from openmint.engine.optimizer import is_finite
from openmint.engine.plan import ChunkOutcome, MicroBatch, SampleBatch
from openmint.engine.replay import total
from openmint.engine.route_record import RouteCache
from openmint.engine.runs import Runs, RunSnapshot, Update
from openmint.engine.sample_step import Sampler, places_in
from openmint.engine.spread import SpreadTrainer
from openmint.engine.train_step import OpenTrain, Trainer
from openmint.errors import InvalidRequest, NonFinite
from openmint.kernels.attend import BLOCK
from openmint.kernels.choice import use_graphs
from openmint.kernels.compile import compile_kernels
from openmint.layers.adapters import AdapterWeights
from openmint.layers.attention import KVCache, TiledCache
from openmint.models.model import Model
from openmint.types import (
    AdamParams,
    BaseInfo,
    Datum,
    Digest,
    FloatArray,
    IntArray,
    LoraSpec,
    LossSpec,
    RunId,
)


class Engine:
    """A resident base, its training sessions, its serving slots and its page cache."""

    def __init__(self, model: Model, base: BaseInfo, config: WorkerConfig) -> None:
        self.base = base
        self.dtype = model.head.dtype
        if base.device == "cpu":
            compile_kernels(self.dtype)
        self._shards = model.shards
        lanes = Lanes(torch.device(base.device), are_many=model.shards.ranks.size == 1)
        self._trainer: Trainer | SpreadTrainer = Trainer(model, lanes)
        if model.data_ranks.size > 1:
            self._trainer = SpreadTrainer(model, lanes, model.data_ranks)
        self.runs = Runs(base, self.dtype, config.training_bytes, model.shards)
        self._slots: dict[Digest, AdapterWeights] = {}
        self._open: dict[int, OpenTrain] = {}
        shape = model.cache_shape
        token_bytes = shape.num_values * self.dtype.itemsize
        self.num_pages = max(1, config.kv_cache_bytes // (token_bytes * config.page_tokens))
        size = (shape.num_layers, self.num_pages, config.page_tokens)
        cache: KVCache | TiledCache
        self._is_tiled = model.is_tiled
        if model.is_tiled and config.page_tokens % BLOCK == 0:
            cache = TiledCache(*size, shape.num_kv_heads, shape.key_width)
        else:
            widths, device = (shape.key_width, shape.value_width), torch.device(base.device)
            cache = KVCache(*size, shape.num_kv_heads, widths, self.dtype, device, shape.index)
        self._page_tokens, self._routes = config.page_tokens, None
        if model.route_shape is not None:
            self._routes = RouteCache(model.route_shape, self.num_pages * config.page_tokens)
        self._sampler = Sampler(self._replayed(model, config), cache, self._routes, lanes)

    def _replayed(self, model: Model, config: WorkerConfig) -> Model:
        """The model that samples: on GPUs its decode steps are captured and replayed, where tokens
        choose nothing. A choice would have to be recorded out of the graph."""
        if model.route_shape is not None or self._shards.ranks.size > 1:
            return model
        if not use_graphs(torch.device(self.base.device)):
            return model
        from openmint.engine.decode_graphs import GraphedModel

        return GraphedModel(model, -(-self.base.context_length // config.page_tokens))

    # -- training sessions ------------------------------------------------------------------------

    def create_run(self, run_id: RunId, spec: LoraSpec, seed: int) -> int:
        """Start a session with a fresh adapter; its number of parameters."""
        return self.runs.create(run_id, spec, seed).shard.whole.num_params

    def restore_run(self, run_id: RunId, snapshot: RunSnapshot) -> int:
        """Start a session with this state, or overwrite a live one; its number of parameters.

        Raises InvalidRequest when the live session has another shape.
        """
        if run_id in self.runs and self.runs[run_id].layout.spec != snapshot.spec:
            have, want = self.runs[run_id].layout.spec, snapshot.spec
            raise InvalidRequest(f"run {run_id} trains {have}, the saved state is {want}")
        return self.runs.restore(run_id, snapshot).shard.whole.num_params

    def read_gradient(self, run_id: RunId, read_into: Callable[[memoryview], None]) -> None:
        """Have a logged gradient be the run's accumulated one. Raises StoreFailed."""
        self.runs[run_id].read_gradient(read_into)

    def prepare_update(self, run_id: RunId, adam: AdamParams) -> Update:
        """One update of the run, not yet in effect. Raises InvalidRequest, NotFound."""
        return self.runs[run_id].prepare(adam)

    def publish_update(self, run_id: RunId, update: Update) -> None:
        self.runs[run_id].publish(update)

    def discard_update(self, run_id: RunId, update: Update) -> None:
        self.runs[run_id].discard(update)

    def drop_run(self, run_id: RunId) -> None:
        self.runs.drop(run_id)

    def snapshot_run(self, run_id: RunId) -> RunSnapshot:
        return self.runs.snapshot(run_id)

    def export_run(self, run_id: RunId) -> tuple[AdapterWeights, int]:
        """The run's weights, which later updates leave alone, and its number of updates."""
        run = self.runs[run_id]
        return run.share_weights(), run.state.num_optim_steps

    @property
    def num_runs(self) -> int:
        return len(self.runs)

    @property
    def training_bytes(self) -> int:
        return self.runs.used_bytes

    # -- forward and backward ---------------------------------------------------------------------

    def open_train(
        self,
        work_id: int,
        run_id: RunId,
        data: tuple[Datum, ...],
        loss: LossSpec,
        forward_only: bool,
    ) -> None:
        """Make ready for the micro-batches of a work. Raises NotFound for an unknown run."""
        self._open[work_id] = OpenTrain(self.runs[run_id], data, loss, forward_only)

    def train(self, micro_batch: MicroBatch) -> None:
        items = [(self._open[item.work_id], item.datum_index) for item in micro_batch.items]
        self._trainer.run(items)

    def close_train(self, work_id: int) -> tuple[tuple[FloatArray, ...], dict[str, float]]:
        """The work's log-probabilities and metrics; its gradient joins the run's, if finite.

        Raises NonFinite for a gradient with NaN or infinities; the run is as before the work.
        """
        work = self._open.pop(work_id)
        loss_sum, grads_P = sum(work.losses), work.gradient()
        if grads_P is not None:
            work.run.shard.sum_shares_(grads_P)
            if not work.run.shard.agree(is_finite(grads_P)):
                raise NonFinite(
                    f"loss {work.loss.name} gave a gradient with NaN or infinite values (loss "
                    f"{loss_sum}); this forward_backward was left out, the run is unharmed. "
                    "Check the data's logprobs, advantages and weights"
                )
            work.run.add_gradient(grads_P)
        logprobs = tuple(row for row in work.logprobs if row is not None)
        metrics = {"loss:sum": loss_sum, "num_tokens:sum": float(work.num_tokens)}
        if work.routes:
            metrics |= total(work.routes.values()).metrics
        return logprobs, metrics

    def abandon_train(self, work_id: int) -> None:
        self._open.pop(work_id, None)

    def score(self, weights: AdapterWeights, tokens_T: IntArray) -> tuple[FloatArray, bool]:
        """Log-probabilities of the tokens after the first, as a training run with these weights
        would compute them; and whether every B is zero."""
        run = self.runs.passing(weights)
        ones_T = np.ones(len(tokens_T) - 1, np.float32)
        datum = Datum(tokens_T[:-1], {"target_tokens": tokens_T[1:], "weights": ones_T})
        work = OpenTrain(run, (datum,), LossSpec("cross_entropy"), forward_only=True)
        self._trainer.run([(work, 0)])
        (logprobs_T,) = work.logprobs
        assert logprobs_T is not None
        return logprobs_T, not any(b_RO.any() for _, b_RO in weights.views.values())

    # -- serving ----------------------------------------------------------------------------------

    def slot_bytes(self, weights: AdapterWeights) -> int:
        """What a serving slot of these weights takes beside their vector in host memory."""
        if self._is_tiled:
            return weights.tiles_bytes
        return self._shards.of(weights.layout).layout.num_params * self.dtype.itemsize

    def attach(self, revision: Digest, weights: AdapterWeights) -> None:
        """Put weights into a serving slot under their revision's name.

        An update replaces a run's weight vector and never writes into it, so a slot may share the
        vector that was exported.
        """
        shard = self._shards.of(weights.layout)
        flat_P = shard.take(weights.flat_P).to(self.base.device)
        self._slots[revision] = AdapterWeights(shard.layout, flat_P, revision)

    def detach(self, revision: Digest) -> None:
        del self._slots[revision]
        self._sampler.forget()

    def sample(self, batch: SampleBatch) -> list[ChunkOutcome]:
        return self._sampler.run(batch, self._slots)

    def routes(self, pages: Sequence[int], num_tokens: int) -> bytes:
        """What the first tokens of a sequence chose, who are in these pages; empty where there is
        nothing to choose."""
        if self._routes is None:
            return b""
        places_N = places_in(pages, np.arange(num_tokens), self._page_tokens)
        return self._routes.record(places_N)
