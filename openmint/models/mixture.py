"""Mixtures of experts over grouped-query attention: Qwen3-MoE, OLMoE, GLM-4.5, Mixtral, MiniMax-M2.

Proved against `transformers` in tests/models/test_families.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor
from transformers import PretrainedConfig

from openmint.errors import InvalidRequest
from openmint.layers.feed_forward import GatedFeedForward, MixtureOfExperts
from openmint.layers.ranks import ALONE
from openmint.layers.rotary import Rotary
from openmint.layers.router import SigmoidRouter, SoftmaxRouter
from openmint.models.decoder import (
    Decoder,
    FeedForward,
    block,
    check_activation,
    gated,
    grouped_query,
    grouped_query_cache,
    head_dim_of,
    layers_of,
)
from openmint.models.model import RouteShape
from openmint.models.weights import Module, Tensors

SOFTMAX = ("Qwen3MoeForCausalLM", "OlmoeForCausalLM")
SIGMOID = ("Glm4MoeForCausalLM",)
MIXTRAL = ("MixtralForCausalLM",)
MINIMAX = ("MiniMaxM2ForCausalLM",)
OWN_NAMES = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}
"""What the checkpoints of these two call what `transformers`, and we, name as in other families."""


def softmax_mixture(config: PretrainedConfig, weights: Module) -> Decoder:
    """Qwen3-MoE and OLMoE; Mixtral, whose weights always sum to one."""
    if getattr(config, "clip_qkv", None) is not None:
        raise InvalidRequest("clip_qkv is not supported; supported: a config without it")
    dense = getattr(config, "mlp_only_layers", None) or ()
    every = getattr(config, "decoder_sparse_step", 1)
    layers = range(config.num_hidden_layers)
    sparse = [index for index in layers if index not in dense and (index + 1) % every == 0]

    def feed_forward(module: Module, index: int) -> FeedForward:
        if index not in sparse:
            return gated(module, module.division.tensor)
        sums_to_one = getattr(config, "norm_topk_prob", True)
        router = SoftmaxRouter(module["gate.weight"], config.num_experts_per_tok, sums_to_one)
        routed = experts(module, config.num_experts)
        return MixtureOfExperts(router, *routed, None, sparse.index(index))

    shape = RouteShape(len(sparse), config.num_experts, config.num_experts_per_tok)
    return _decoder(config, weights, feed_forward, shape)


def sigmoid_mixture(config: PretrainedConfig, weights: Module) -> Decoder:
    """GLM-4.5."""
    return _decoder(config, weights, partial(with_shared, config), with_shared_routes(config))


def mixtral(config: PretrainedConfig, weights: Module) -> Decoder:
    return softmax_mixture(config, replace(weights, weights=OwnNames(weights.weights)))


def minimax_m2(config: PretrainedConfig, weights: Module) -> Decoder:
    def feed_forward(module: Module, index: int) -> FeedForward:
        gate_ED, bias_E = module.exact("gate.weight"), module.exact("e_score_correction_bias")
        router = SigmoidRouter(gate_ED, bias_E, config.num_experts_per_tok, 1, 1, True, 1.0)
        return MixtureOfExperts(router, *experts(module, config.num_experts), None, index)

    own = replace(weights, weights=OwnNames(weights.weights))
    shape = RouteShape(config.num_hidden_layers, config.num_experts, config.num_experts_per_tok)
    return _decoder(config, own, feed_forward, shape)


def usual_name(name: str) -> str:
    """A tensor's name in such a checkpoint as other families have it; other names as they are."""
    for usual, own in OWN_NAMES.items():
        name = name.replace(own, usual)
    return name


@dataclass(frozen=True, slots=True)
class OwnNames:
    """The tensors of such a checkpoint, by the usual names."""

    tensors: Tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self._own(name)]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(self._own(name))

    def exact(self, name: str) -> Tensor:
        return self.tensors.exact(self._own(name))

    def part(self, name: str, cut: tuple[slice, ...]) -> Tensor:
        return self.tensors.part(self._own(name), cut)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self._own(name))

    def _own(self, name: str) -> str:
        for usual, own in OWN_NAMES.items():
            name = name.replace(usual, own)
        return name


def with_shared(config: PretrainedConfig, module: Module, index: int) -> FeedForward:
    """The feed-forward layer of DeepSeek-V3 and its like: some, the first, are dense; the others
    have routed experts beside one that all tokens share."""
    if index not in (sparse := _sparse_layers(config)):
        return gated(module, module.division.tensor)
    router = SigmoidRouter(
        module.exact("gate.weight"),
        module.exact("gate.e_score_correction_bias"),
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )
    shared = None
    if config.n_shared_experts:
        shared = gated(module.under("shared_experts"), module.division.mixture)
    routed = experts(module, config.n_routed_experts)
    return MixtureOfExperts(router, *routed, shared, sparse.index(index))


def with_shared_routes(config: PretrainedConfig) -> RouteShape:
    """What tokens choose where feed-forward layers are those of `with_shared`."""
    count = len(_sparse_layers(config))
    return RouteShape(count, config.n_routed_experts, config.num_experts_per_tok)


def _sparse_layers(config: PretrainedConfig) -> list[int]:
    """Which of them have experts."""
    if kinds := getattr(config, "mlp_layer_types", None):
        return [index for index, kind in enumerate(kinds) if kind == "sparse"]
    return list(range(config.first_k_dense_replace, config.num_hidden_layers))


def experts(module: Module, count: int) -> tuple[list[GatedFeedForward], slice]:
    """Experts that a checkpoint has one by one: this rank's, and which they are. Where experts
    aren't divided among ranks each of them is."""
    division = module.division
    own = division.experts.part(count, "experts")
    ranks = division.tensor if division.experts.size == 1 else ALONE
    return [gated(module.under(f"experts.{e}"), ranks) for e in range(own.start, own.stop)], own


def _decoder(
    config: PretrainedConfig,
    weights: Module,
    feed_forward: Callable[[Module, int], FeedForward],
    routes: RouteShape,
) -> Decoder:
    check_activation(config)
    window = getattr(config, "sliding_window", None)
    window = window if getattr(config, "use_sliding_window", True) else None
    blocks = [
        block(
            config,
            layer,
            grouped_query(config, layer.under("self_attn"), index, window),
            feed_forward(layer.under("mlp"), index),
        )
        for index, layer in enumerate(layers_of(config, weights))
    ]
    width = int(head_dim_of(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
    rotary = Rotary(config, width, str(blocks[0].input_norm_D.device))
    cache = grouped_query_cache(config, weights.division.tensor)
    return Decoder(config, weights, blocks, rotary, cache, routes)
