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
from openmint.layers.feed_forward import GatedFeedForward
from openmint.layers.grouped_query import GroupedQueryAttention
from openmint.layers.linear import LoraLinear, TiledLinear, lora_linear
from openmint.layers.norm import rms_norm
from openmint.layers.rotary import Angles, Rotary
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

    @property
    def linears(self) -> list[LoraLinear]:
        return [*self.attention.linears, *self.feed_forward.linears]

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
        normed_TD = rms_norm(x_TD, self.input_norm_D, self.eps)
        x_TD = x_TD + self.attention.forward(normed_TD, angles, batch)
        normed_TD = rms_norm(x_TD, self.feed_forward_norm_D, self.eps)
        return x_TD + self.feed_forward.forward(normed_TD, batch)


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
        self.head = lora_linear("unembed", [("lm_head", head_VD, None)], weights.serves_int8)
        self.eps = config.rms_norm_eps
        self.rotary, self.cache_shape, self.route_shape = rotary, cache_shape, route_shape
        self._tiled_paths = [each.paths for each in self.linears if isinstance(each, TiledLinear)]

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
        for layer in self.layers:
            x_TD = layer.forward(x_TD, angles, batch)
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
    return Block(
        attention,
        feed_forward,
        layer["input_layernorm.weight"],
        layer["post_attention_layernorm.weight"],
        config.rms_norm_eps,
    )


def grouped_query(
    config: PretrainedConfig,
    module: Module,
    index: int,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> GroupedQueryAttention:
    """Attention from `q_proj`, `k_proj`, `v_proj`, `o_proj` and what else the checkpoint has."""
    scale = head_dim_of(config) ** -0.5
    heads = Heads(index, scale, NO_WINDOW if window is None else window, sinks_H)
    return GroupedQueryAttention(
        heads,
        (config.num_attention_heads, config.num_key_value_heads),
        module.linear("attn", "q_proj", "k_proj", "v_proj"),
        module.linear("attn", "o_proj"),
        (module.get("q_norm.weight"), module.get("k_norm.weight")),
        config.rms_norm_eps,
    )


def gated(module: Module) -> GatedFeedForward:
    """A feed-forward layer, or expert, from `gate_proj`, `up_proj` and `down_proj`."""
    gate_up = module.linear("mlp", "gate_proj", "up_proj")
    return GatedFeedForward(gate_up, module.linear("mlp", "down_proj"))


def grouped_query_cache(config: PretrainedConfig) -> CacheShape:
    width = head_dim_of(config)
    return CacheShape(config.num_hidden_layers, config.num_key_value_heads, width, width)


def head_dim_of(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def layers_of(config: PretrainedConfig, weights: Module) -> list[Module]:
    return [weights.under(f"model.layers.{i}") for i in range(config.num_hidden_layers)]


def check_activation(config: PretrainedConfig) -> None:
    """Raises InvalidRequest for another than ours."""
    if config.hidden_act != "silu":
        raise InvalidRequest(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
