"""Latent attention with routed and shared experts: DeepSeek-V3, Kimi-K2, GLM-4.7-Flash; and with an
indexer that chooses keys: DeepSeek-V3.2, GLM-5.

Proved against `transformers` in tests/models/test_families.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

from transformers import PretrainedConfig

from openmint.errors import InvalidRequest
from openmint.layers.attention import Heads
from openmint.layers.latent import Indexer, LatentAttention, LatentShape
from openmint.layers.ranks import Split
from openmint.layers.rotary import Rotary
from openmint.models.decoder import Decoder, block, check_activation, layers_of
from openmint.models.mixture import with_shared, with_shared_routes
from openmint.models.model import CacheShape
from openmint.models.weights import Module

ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
)
INDEX_PAIRS = "GlmMoeDsaForCausalLM"
"""Whose indexer turns neighbours together, as its attention does."""


def deepseek(config: PretrainedConfig, weights: Module) -> Decoder:
    check_activation(config)
    kinds = indexer_kinds(config)
    blocks = []
    for index, layer in enumerate(layers_of(config, weights)):
        module, indexer = layer.under("self_attn"), None
        if kinds and kinds[index] == "full":
            place = kinds[:index].count("full")
            indexer = _indexer(config, module.under("indexer"), place)
        attention = _attention(config, module, index, indexer, is_sparse=bool(kinds))
        feed_forward = with_shared(config, layer.under("mlp"), index)
        blocks.append(block(config, layer, attention, feed_forward))
    rotary = Rotary(config, config.qk_rope_head_dim, str(blocks[0].input_norm_D.device))
    width = config.kv_lora_rank + config.qk_rope_head_dim
    index_width = config.index_head_dim if kinds else 0
    index_shape = kinds.count("full"), index_width
    cache = CacheShape(config.num_hidden_layers, 1, width, 0, index_shape)
    routes = with_shared_routes(config)
    if kinds:
        routes = replace(routes, num_indexers=index_shape[0], num_keys=config.index_topk)
    return Decoder(config, weights, blocks, rotary, cache, routes)


def indexer_kinds(config: PretrainedConfig) -> list[str]:
    """What each layer does about its keys: it chooses (`full`) or takes over the choice of the last
    layer that did (`shared`). Empty: all layers see all keys."""
    if not hasattr(config, "index_topk"):
        return []
    return list(getattr(config, "indexer_types", None) or ["full"] * config.num_hidden_layers)


def _attention(
    config: PretrainedConfig,
    module: Module,
    index: int,
    indexer: Indexer | None,
    *,
    is_sparse: bool,
) -> LatentAttention:
    ranks = module.division.tensor
    own_heads = ranks.part(config.num_attention_heads, "heads")
    shape = LatentShape(
        own_heads.stop - own_heads.start,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    by_head = Split("out", ranks)
    q_up, q_name = None, "q_proj"
    if config.q_lora_rank is None and ranks.size > 1:
        raise InvalidRequest(
            "worker.tensor_parallel can't divide latent attention without q_lora_rank; "
            "use worker.expert_parallel"
        )
    if config.q_lora_rank is not None:
        q_up, q_name = (
            (module["q_a_layernorm.weight"], module.linear("attn", "q_b_proj", split=by_head)),
            "q_a_proj",
        )
    width = shape.from_latent + shape.value
    return LatentAttention(
        Heads(index, _scale(config), values_within=shape.latent, is_sparse=is_sparse),
        shape,
        module.linear("attn", q_name, "kv_a_proj_with_mqa", split=Split(None, ranks)),
        q_up,
        module["kv_a_layernorm.weight"],
        module.linear("attn", "kv_b_proj", split=by_head),
        module.part("kv_b_proj.weight", slice(own_heads.start * width, own_heads.stop * width)),
        module.linear("attn", "o_proj", split=Split("in", ranks)),
        indexer,
        turns_pairs=is_sparse or getattr(config, "rope_interleave", True),
    )


def _indexer(config: PretrainedConfig, module: Module, place: int) -> Indexer:
    return Indexer(
        place,
        config.index_n_heads,
        config.index_topk,
        (module["wq_b.weight"], module["wk.weight"], module.exact("weights_proj.weight")),
        (module["k_norm.weight"], module["k_norm.bias"]),
        config.qk_rope_head_dim,
        turns_pairs=(config.architectures or [""])[0] == INDEX_PAIRS,
    )


def _scale(config: PretrainedConfig) -> float:
    """Of scores; YaRN (arXiv:2309.00071) raises it for long contexts."""
    scale: float = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    is_stretched = rope.get("rope_type", "default") != "default" and rope["factor"] > 1
    if not (is_stretched and rope.get("mscale_all_dim")):
        return scale
    stretch: float = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    return scale * stretch * stretch
