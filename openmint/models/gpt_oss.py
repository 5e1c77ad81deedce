"""gpt-oss: grouped-query attention with sinks, every other layer with a window, and experts whose
gates are clamped (arXiv:2508.10925).

Proved against `transformers` in tests/models/test_families.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from openmint.layers.feed_forward import GatedFeedForward, MixtureOfExperts
from openmint.layers.ranks import ALONE, Split
from openmint.layers.rotary import Rotary
from openmint.layers.router import TopSoftmaxRouter
from openmint.models.decoder import (
    Decoder,
    block,
    grouped_query,
    grouped_query_cache,
    head_dim_of,
    layers_of,
)
from openmint.models.model import RouteShape
from openmint.models.weights import Module

ARCHITECTURES = ("GptOssForCausalLM",)


def gpt_oss(config: PretrainedConfig, weights: Module) -> Decoder:
    blocks = []
    for index, layer in enumerate(layers_of(config, weights)):
        is_windowed = config.layer_types[index] == "sliding_attention"
        window = config.sliding_window if is_windowed else None
        module = layer.under("self_attn")
        attention = grouped_query(config, module, index, window, module["sinks"])
        blocks.append(block(config, layer, attention, _mixture(config, layer.under("mlp"), index)))
    rotary = Rotary(config, head_dim_of(config), str(blocks[0].input_norm_D.device))
    shape = RouteShape(len(blocks), config.num_local_experts, config.num_experts_per_tok)
    cache = grouped_query_cache(config, weights.division.tensor)
    return Decoder(config, weights, blocks, rotary, cache, shape)


def _mixture(config: PretrainedConfig, module: Module, index: int) -> MixtureOfExperts:
    router = TopSoftmaxRouter(
        module["router.weight"], module["router.bias"], config.num_experts_per_tok
    )
    return MixtureOfExperts(router, *_experts(config, module.under("experts")), None, index)


def _experts(config: PretrainedConfig, module: Module) -> tuple[list[GatedFeedForward], slice]:
    """This rank's, and which they are. The checkpoint has them as stacks, transposed, in which
    columns of gate and up alternate."""
    division = module.division
    own = division.experts.part(config.num_local_experts, "experts")
    ranks = division.tensor if division.experts.size == 1 else ALONE
    inner = ranks.part(config.intermediate_size, "columns of experts")
    both, every = slice(2 * inner.start, 2 * inner.stop), slice(None)
    gate_up_EIO = module.part("gate_up_proj", own, every, both)
    gate_up_bias_EO = module.part("gate_up_proj_bias", own, both)
    down_EIO, down_bias_EO = module.part("down_proj", own, inner), module["down_proj_bias"][own]
    activation = partial(clamped_gate, steepness=config.swiglu_alpha, limit=config.swiglu_limit)
    experts = []
    for expert, number in enumerate(range(own.start, own.stop)):
        path = f"{module.path}.{number}"
        sides = [
            (
                f"{path}.{name}",
                gate_up_EIO[expert, :, first::2].t().contiguous(),
                gate_up_bias_EO[expert, first::2].contiguous(),
            )
            for first, name in enumerate(("gate_proj", "up_proj"))
        ]
        bias_O = down_bias_EO[expert] if ranks.rank == 0 else None
        down = (f"{path}.down_proj", down_EIO[expert].t().contiguous(), bias_O)
        gate_up = module.made("mlp", sides, Split("out", ranks))
        out = module.made("mlp", [down], Split("in", ranks))
        experts.append(GatedFeedForward(gate_up, out, activation))
    return experts, own


def clamped_gate(gate_up_TW: Tensor, *, steepness: float, limit: float) -> Tensor:
    """`(up + 1) * gate * sigmoid(steepness * gate)` of clamped values."""
    gate, up = gate_up_TW.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * steepness)
