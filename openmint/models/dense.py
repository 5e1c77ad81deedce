"""The dense family: Llama, SmolLM2, Qwen2, Qwen3, Mistral.

Its members differ by q/k/v bias, q/k norm, window and rope scaling, all read from the checkpoint
and its Hugging Face config. Proved against `transformers` in tests/models/test_dense.py.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from openmint.errors import InvalidRequest
from openmint.layers.adapters import AdapterBatch
from openmint.layers.attention import PackedAttention, TiledPages
from openmint.layers.batch import Batch
from openmint.layers.rotary import Rotary
from openmint.models.decoder import (
    Decoder,
    block,
    check_activation,
    gated,
    grouped_query,
    grouped_query_cache,
    head_dim_of,
    layers_of,
)
from openmint.models.tiled_dense import TiledDense
from openmint.models.tiled_training import TiledTraining
from openmint.models.weights import Module

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


class DenseModel(Decoder):
    """A decoder whose whole stack kernels compute, where the machine has them."""

    def __init__(self, config: PretrainedConfig, weights: Module) -> None:
        _check(config)
        if weights.division.experts.size > 1:
            raise InvalidRequest("this base has no experts; use worker.tensor_parallel")
        window = _window(config)
        blocks = [
            block(
                config,
                layer,
                grouped_query(config, layer.under("self_attn"), index, window),
                gated(layer.under("mlp"), weights.division.tensor),
            )
            for index, layer in enumerate(layers_of(config, weights))
        ]
        device = str(blocks[0].input_norm_D.device)
        rotary = Rotary(config, head_dim_of(config), device)
        cache = grouped_query_cache(config, weights.division.tensor)
        super().__init__(config, weights, blocks, rotary, cache)
        # One kernel for the whole stack has no place where ranks could meet.
        suits = self.shards.ranks.size == 1 and TiledDense.suits(self)
        self._tiled = TiledDense(self) if suits else None
        self._training = TiledTraining(self) if suits else None

    @property
    def is_tiled(self) -> bool:
        return self._tiled is not None

    def sample(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        pages: TiledPages,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        assert self._tiled is not None
        return self._tiled.forward(self.embed(tokens_T), positions_T, pages, adapters)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: Batch) -> Tensor:
        if self._training is not None and isinstance(batch.attention, PackedAttention):
            return self._training.forward(self.embed(tokens_T), positions_T, batch)
        return super().forward(tokens_T, positions_T, batch)


def _window(config: PretrainedConfig) -> int | None:
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _check(config: PretrainedConfig) -> None:
    """Refuse by name what this family does not compute."""
    check_activation(config)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        listed = ", ".join(sorted(kinds))
        raise InvalidRequest(f"layers of different attention kinds are not supported: {listed}")
