"""A pre-norm transformer of blocks: what all families share.

Shapes: T packed tokens, D hidden size, V vocabulary. A family's file says which attention and
which feed-forward layer each block has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from openmint.errors import InvalidRequest
from openmint.kernels.adapter_tiles import Direction
from openmint.layers.adapters import AdapterBatch
from openmint.layers.attention import NO_WINDOW, Heads, TiledPages
from openmint.layers.batch import Batch
from openmint.layers.feed_forward import GatedFeedForward, MixtureOfExperts
from openmint.layers.gathered import BlockWeights
from openmint.layers.grouped_query import GroupedQueryAttention
from openmint.layers.linear import LoraLinear, TiledLinear, lora_linear
from openmint.layers.norm import rms_norm
from openmint.layers.ranks import ALONE, Ranks, Split
from openmint.layers.rotary import Angles, Rotary
from openmint.layers.shards import Shards
from openmint.models.model import CacheShape, RouteShape
from openmint.models.weights import Module
from openmint.types import TargetModule

DIRECTIONS: tuple[Direction, ...] = ("forth", "back")


class AttentionLayer(Protocol):
    @property
    def linears(self) -> Sequence[LoraLinear]: ...

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor: ...


class FeedForward(Protocol):
    @property
    def linears(self) -> Sequence[LoraLinear]: ...

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Block:
    """Attention, then feed-forward, each added to its input."""

    attention: Any
    """An `AttentionLayer`."""
    feed_forward: FeedForward
    input_norm_D: Tensor
    feed_forward_norm_D: Tensor
    eps: float
    attention_ranks: Ranks = ALONE
    """Which divide the attention; likewise the feed-forward layer."""
    feed_forward_ranks: Ranks = ALONE

    @property
    def linears(self) -> list[LoraLinear]:
        return [*self.attention.linears, *self.feed_forward.linears]

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
        normed_TD = self.attention_ranks.enter(rms_norm(x_TD, self.input_norm_D, self.eps))
        y_TD = self.attention.forward(normed_TD, angles, batch)
        x_TD = x_TD + self.attention_ranks.leave(y_TD)
        normed_TD = rms_norm(x_TD, self.feed_forward_norm_D, self.eps)
        normed_TD = self.feed_forward_ranks.enter(normed_TD)
        y_TD = self.feed_forward.forward(normed_TD, batch)
        return x_TD + self.feed_forward_ranks.leave(y_TD)


class Decoder:
    """A resident base; implements `models.model.Model`."""

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Module,
        blocks: Sequence[Block],
        rotary: Rotary,
        cache_shape: CacheShape,
        route_shape: RouteShape | None = None,
    ) -> None:
        self.layers = blocks
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.final_norm_D = weights["model.norm.weight"]
        head_VD = self.embedding_VD if config.tie_word_embeddings else weights["lm_head.weight"]
        self.data_ranks = weights.division.data
        head_parts = [("lm_head", head_VD, None)]
        split = Split(None, self.data_ranks)
        self.head = lora_linear("unembed", head_parts, weights.serves_int8, split)
        self.eps = config.rms_norm_eps
        self.rotary, self.cache_shape, self.route_shape = rotary, cache_shape, route_shape
        self._tiled_paths = [each.paths for each in self.linears if isinstance(each, TiledLinear)]
        pieces = [piece for linear in (*self.linears, self.head) for piece in linear.pieces]
        self.shards = Shards(pieces, weights.division.world)
        self._weights: list[BlockWeights] = []
        if self.data_ranks.size > 1:
            self._weights = [BlockWeights(layer.linears, self.data_ranks) for layer in blocks]

    @property
    def linears(self) -> list[LoraLinear]:
        """Every linear layer but the head, in order."""
        return [linear for layer in self.layers for linear in layer.linears]

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        return tuple(target for linear in (*self.linears, self.head) for target in linear.targets)

    @property
    def is_tiled(self) -> bool:
        return False

    def sample(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        pages: TiledPages,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        raise AssertionError("no kernel computes this stack whole")

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: Batch) -> Tensor:
        x_TD = self.embed(tokens_T)
        if batch.adapters is not None and self._tiled_paths:
            for direction in DIRECTIONS if x_TD.requires_grad else DIRECTIONS[:1]:
                batch.adapters.stack.lay_out(self._tiled_paths, direction)
        angles = self.rotary.at(positions_T, x_TD.dtype)
        for index, layer in enumerate(self.layers):
            if not self._weights:
                x_TD = layer.forward(x_TD, angles, batch)
                continue
            weights = self._weights[index]
            x_TD = weights.end(layer.forward(weights.begin(x_TD), angles, batch))
        return rms_norm(x_TD, self.final_norm_D, self.eps)

    def embed(self, tokens_T: Tensor) -> Tensor:
        x_TD = F.embedding(tokens_T, self.embedding_VD)
        if torch.is_grad_enabled():
            x_TD.requires_grad_()  # nothing frozen asks for a gradient, so the graph starts here
        return x_TD


def block(
    config: PretrainedConfig, layer: Module, attention: AttentionLayer, feed_forward: FeedForward
) -> Block:
    """The block of a layer whose norms have their usual names."""
    division = layer.division
    is_mixture = isinstance(feed_forward, MixtureOfExperts)
    return Block(
        attention,
        feed_forward,
        layer["input_layernorm.weight"],
        layer["post_attention_layernorm.weight"],
        config.rms_norm_eps,
        division.tensor,
        division.mixture if is_mixture else division.tensor,
    )


def grouped_query(
    config: PretrainedConfig,
    module: Module,
    index: int,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> GroupedQueryAttention:
    """Attention from `q_proj`, `k_proj`, `v_proj`, `o_proj` and what else the checkpoint has."""
    scale, ranks = head_dim_of(config) ** -0.5, module.division.tensor
    own_heads = ranks.part(config.num_attention_heads, "heads")
    if sinks_H is not None:
        sinks_H = sinks_H[own_heads]
    heads = Heads(index, scale, NO_WINDOW if window is None else window, sinks_H)
    q_norm_D, k_norm_D = module.get("q_norm.weight"), module.get("k_norm.weight")
    if ranks.size > 1 and q_norm_D is not None and len(q_norm_D) != head_dim_of(config):
        raise InvalidRequest(
            "worker.tensor_parallel can't divide attention whose q_norm spans all heads; "
            "use worker.expert_parallel"
        )
    return GroupedQueryAttention(
        heads,
        (own_heads.stop - own_heads.start, num_kv_heads(config, ranks)),
        module.linear("attn", "q_proj", "k_proj", "v_proj", split=Split("out", ranks)),
        module.linear("attn", "o_proj", split=Split("in", ranks)),
        (q_norm_D, k_norm_D),
        config.rms_norm_eps,
    )


def num_kv_heads(config: PretrainedConfig, ranks: Ranks) -> int:
    """This rank's heads of keys. Raises InvalidRequest where there aren't as many on each."""
    own = ranks.part(config.num_key_value_heads, "heads of keys and values")
    return int(own.stop - own.start)


def gated(module: Module, ranks: Ranks = ALONE) -> GatedFeedForward:
    """A feed-forward layer, or expert, from `gate_proj`, `up_proj` and `down_proj`."""
    gate_up = module.linear("mlp", "gate_proj", "up_proj", split=Split("out", ranks))
    return GatedFeedForward(gate_up, module.linear("mlp", "down_proj", split=Split("in", ranks)))


def grouped_query_cache(config: PretrainedConfig, ranks: Ranks) -> CacheShape:
    width = head_dim_of(config)
    return CacheShape(config.num_hidden_layers, num_kv_heads(config, ranks), width, width)


def head_dim_of(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def layers_of(config: PretrainedConfig, weights: Module) -> list[Module]:
    return [weights.under(f"model.layers.{i}") for i in range(config.num_hidden_layers)]


def check_activation(config: PretrainedConfig) -> None:
    """Raises InvalidRequest for another than ours."""
    if config.hidden_act != "silu":
        raise InvalidRequest(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
