"""Decode steps as CUDA graphs: captured once per batch size, then replayed with other values.

A decode step is a thousand small kernels, and launching them one by one takes longer than running
them. A graph launches them at once, but always the same ones on the same memory. So its inputs have
places of their own, wide enough for the longest sequence and for as many adapters as sequences;
steps are padded to a power of two. Padding writes no keys, has no adapter and is cut off again.

Never ran on a GPU: on CPUs the padded step is checked with Triton's interpreter, uncaptured.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openmint.kernels.segmented import segments
from openmint.layers.adapters import AdapterBatch, AdapterStack
from openmint.layers.attention import KVCache, TiledPages
from openmint.layers.batch import Batch
from openmint.layers.decode_attention import DecodeAttention
from openmint.layers.segmented import AdapterTable, SegmentedDelta, rank_block
from openmint.models.model import Model
from openmint.types import TargetGroup, TargetModule

if TYPE_CHECKING:
    from openmint.kernels.segmented import Segments


class GraphedModel:
    """A model whose decode steps are replayed; everything else passes through to it.

    Implements `models.model.Model`. Owned by the engine's thread.
    """

    def __init__(self, model: Model, max_pages: int) -> None:
        """`max_pages` hold the longest sequence there can be."""
        self._model, self._max_pages = model, max_pages
        self.head, self.cache_shape, self.shards = model.head, model.cache_shape, model.shards
        self.route_shape, self.data_ranks = model.route_shape, model.data_ranks
        self._device = model.head.device
        self._steps: dict[tuple[int, int], DecodeStep] = {}

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        return self._model.targets

    @property
    def is_tiled(self) -> bool:
        return self._model.is_tiled

    def sample(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        pages: TiledPages,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        return self._model.sample(tokens_T, positions_T, pages, adapters)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: Batch) -> Tensor:
        attention, adapters = batch.attention, batch.adapters
        if not isinstance(attention, DecodeAttention):
            return self._model.forward(tokens_T, positions_T, batch)
        size = 1 << (len(tokens_T) - 1).bit_length()
        rank = rank_block(adapters.stack.adapters) if adapters else 0
        if (size, rank) not in self._steps:
            self._steps[size, rank] = self._make(size, rank, attention.cache)
        step = self._steps[size, rank]
        step.fill(tokens_T, positions_T, attention, adapters)
        return step.run()[: len(tokens_T)]

    def _make(self, size: int, rank: int, cache: KVCache) -> DecodeStep:
        # The sampler keeps a stack while at most half of its adapters have nothing to do.
        table = AdapterTable(self.targets, 2 * size, self._device) if rank else None
        attention = DecodeAttention(
            cache,
            torch.full((size,), -1, device=self._device),
            torch.zeros(size, self._max_pages, dtype=torch.int32, device=self._device),
            torch.ones(size, dtype=torch.int32, device=self._device),
        )
        return DecodeStep(self._model, size, attention, table)


@dataclass(eq=False)
class DecodeStep:
    """One padded size: its inputs' places, and the graph over them."""

    model: Model
    size: int
    attention: DecodeAttention
    table: AdapterTable | None
    """None: all sequences ask the bare base."""
    _stack: weakref.ref[AdapterStack] | None = field(init=False, default=None)
    """Whose addresses the table holds; weak, so that evicted adapters leave memory."""
    _graph: Any = field(init=False, default=None)
    _hidden_SD: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        device = self.attention.place_S.device
        self._tokens_S = torch.zeros(self.size, dtype=torch.int64, device=device)
        self._positions_S = torch.zeros_like(self._tokens_S)
        self._slot_S = torch.full_like(self._tokens_S, -1)

    def fill(
        self,
        tokens_S: Tensor,
        positions_S: Tensor,
        attention: DecodeAttention,
        adapters: AdapterBatch | None,
    ) -> None:
        """Put a step's values in place; the rows behind them become padding."""
        num_seqs, num_pages = attention.pages_SP.shape
        self._tokens_S[:num_seqs] = tokens_S
        self._positions_S[:num_seqs] = positions_S
        self.attention.place_S.fill_(-1)
        self.attention.place_S[:num_seqs] = attention.place_S
        self.attention.pages_SP[:num_seqs, :num_pages] = attention.pages_SP
        self.attention.length_S.fill_(1)
        self.attention.length_S[:num_seqs] = attention.length_S
        if adapters is None or self.table is None:
            return
        self._slot_S.fill_(-1)
        self._slot_S[:num_seqs] = adapters.slot_T
        if self._stack is None or self._stack() is not adapters.stack:
            self.table.fill(adapters.stack.adapters)
            self._stack = weakref.ref(adapters.stack)

    def run(self) -> Tensor:
        """Hidden states `[size, D]`; the next run overwrites them."""
        if self._slot_S.device.type != "cuda":
            return self._forward()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        assert self._hidden_SD is not None
        return self._hidden_SD

    def _capture(self) -> None:
        """Run once so that every kernel is compiled, then record. Writing the same keys and values
        twice leaves what once leaves."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread is held to what a capture allows: others load adapters meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._hidden_SD = self._forward()

    def _forward(self) -> Tensor:
        adapters: Any = None
        if self.table is not None:
            adapters = TableBatch(self.table, segments(self._slot_S, self.table.num_slots))
        batch = Batch(self.attention, adapters)
        return self.model.forward(self._tokens_S, self._positions_S, batch)


@dataclass(frozen=True, slots=True)
class TableBatch:
    """What layers ask of an `AdapterBatch`, from a table whose adapters change under a graph."""

    table: AdapterTable
    by: Segments
    sink: None = None

    def delta(self, group: TargetGroup, paths: tuple[str, ...]) -> SegmentedDelta:
        return self.table.delta(paths, self.by)
