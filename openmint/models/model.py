"""What the engine asks of an architecture family: one packed forward for all its uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from openmint.layers.adapters import AdapterBatch
from openmint.layers.attention import TiledPages
from openmint.layers.batch import Batch
from openmint.layers.linear import LoraLinear
from openmint.layers.ranks import Ranks
from openmint.layers.shards import Shards
from openmint.types import TargetModule


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token leaves in the KV cache of each layer."""

    num_layers: int
    num_kv_heads: int
    key_width: int
    value_width: int
    """0 where values are a part of the keys."""
    index: tuple[int, int] = (0, 0)
    """Layers that have an indexer, and the width of its keys."""

    @property
    def num_values(self) -> int:
        """Numbers that a token leaves in all layers."""
        width = self.num_kv_heads * (self.key_width + self.value_width)
        return self.num_layers * width + self.index[0] * self.index[1]


@dataclass(frozen=True, slots=True)
class RouteShape:
    """What one token chooses on its way."""

    num_layers: int
    """That have experts."""
    num_experts: int
    num_chosen: int
    num_indexers: int = 0
    num_keys: int = 0
    """That an indexer leaves, once there are more."""

    @property
    def expert_dtype(self) -> np.dtype[Any]:
        """The smallest that numbers all experts."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)


class Model(Protocol):
    """A resident base. Shapes: T packed tokens, D hidden size, V vocabulary."""

    head: LoraLinear
    """Hidden states to logits; the trainer drives it in chunks, so that T x V never exists."""
    cache_shape: CacheShape
    route_shape: RouteShape | None
    """None: its tokens choose nothing."""
    shards: Shards
    """Which parts of the targets every rank has."""
    data_ranks: Ranks
    """Those that divide the data of training."""

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        """Modules that adapters may change, as this rank has them."""
        ...

    @property
    def is_tiled(self) -> bool:
        """Whether `sample` may be called: a kernel computes the whole stack."""
        ...

    def sample(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        pages: TiledPages,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        """`forward` of tokens over their pages, the same to the bit, by a team of threads."""
        ...

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: Batch) -> Tensor:
        """Final hidden states `[T, D]` after the last norm; differentiable when grad is enabled."""
        ...
