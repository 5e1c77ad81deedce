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
from openmint.layers.linear import lora_linear
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
    return Decoder(config, weights, blocks, rotary, grouped_query_cache(config), shape)


def _mixture(config: PretrainedConfig, module: Module, index: int) -> MixtureOfExperts:
    router = TopSoftmaxRouter(
        module["router.weight"], module["router.bias"], config.num_experts_per_tok
    )
    return MixtureOfExperts(router, _experts(config, module.under("experts")), None, index)


def _experts(config: PretrainedConfig, module: Module) -> list[GatedFeedForward]:
    """The checkpoint has them as stacks, transposed, in which columns of gate and up alternate."""
    gate_up_EIO, gate_up_bias_EO = module["gate_up_proj"], module["gate_up_proj_bias"]
    down_EIO, down_bias_EO = module["down_proj"], module["down_proj_bias"]
    activation = partial(clamped_gate, steepness=config.swiglu_alpha, limit=config.swiglu_limit)
    experts = []
    for expert in range(config.num_local_experts):
        path = f"{module.path}.{expert}"
        sides = [
            (
                f"{path}.{name}",
                gate_up_EIO[expert, :, first::2].t().contiguous(),
                gate_up_bias_EO[expert, first::2].contiguous(),
            )
            for first, name in enumerate(("gate_proj", "up_proj"))
        ]
        down = (f"{path}.down_proj", down_EIO[expert].t().contiguous(), down_bias_EO[expert])
        gate_up = lora_linear("mlp", sides, module.serves_int8)
        out = lora_linear("mlp", [down], module.serves_int8)
        experts.append(GatedFeedForward(gate_up, out, activation))
    return experts


def clamped_gate(gate_up_TW: Tensor, *, steepness: float, limit: float) -> Tensor:
    """`(up + 1) * gate * sigmoid(steepness * gate)` of clamped values."""
    gate, up = gate_up_TW.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * steepness)
