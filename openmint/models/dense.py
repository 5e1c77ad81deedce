"""The dense family: Llama, SmolLM2, Qwen2, Qwen3, Mistral.

Shapes: T packed tokens, D hidden size, H query heads, G key/value heads, V vocabulary.
One pre-norm transformer; the members differ by q/k/v bias, q/k norm, window and rope scaling, all
read from the checkpoint and its Hugging Face config. Proved against `transformers` in
tests/models/test_dense.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from openmint.errors import InvalidRequest
from openmint.layers.adapters import AdapterBatch
from openmint.layers.attention import PackedAttention, TiledPages
from openmint.layers.linear import LoraLinear, lora_linear
from openmint.layers.norm import rms_norm
from openmint.layers.rotary import Rotary, rotate
from openmint.layers.swiglu import silu_gate
from openmint.models.model import Batch, CacheShape
from openmint.models.tiled_dense import TiledDense
from openmint.models.tiled_training import TiledTraining
from openmint.models.weights import Weights
from openmint.types import TargetGroup, TargetModule

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


class DenseLayer:
    """One transformer block."""

    def __init__(
        self, config: PretrainedConfig, weights: Weights, index: int, serves_int8: bool
    ) -> None:
        prefix = f"model.layers.{index}"
        self.index = index
        self.eps = config.rms_norm_eps
        self.head_dim = _head_dim(config)
        self.num_heads = (config.num_attention_heads, config.num_key_value_heads)

        def linear(group: TargetGroup, *paths: str) -> LoraLinear:
            names = [f"{prefix}.{path}" for path in paths]
            parts = [(n, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in names]
            return lora_linear(group, parts, serves_int8)

        self.qkv = linear("attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = linear("attn", "self_attn.o_proj")
        self.gate_up = linear("mlp", "mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp", "mlp.down_proj")
        self.input_norm_D = weights[f"{prefix}.input_layernorm.weight"]
        self.mlp_norm_D = weights[f"{prefix}.post_attention_layernorm.weight"]
        self.q_norm_D = weights.get(f"{prefix}.self_attn.q_norm.weight")
        self.k_norm_D = weights.get(f"{prefix}.self_attn.k_norm.weight")

    def forward(self, x_TD: Tensor, cos_TD: Tensor, sin_TD: Tensor, batch: Batch) -> Tensor:
        normed_TD = rms_norm(x_TD, self.input_norm_D, self.eps)
        x_TD = x_TD + self._attention(normed_TD, cos_TD, sin_TD, batch)
        gate_up = self.gate_up(rms_norm(x_TD, self.mlp_norm_D, self.eps), batch.adapters)
        return x_TD + self.down(silu_gate(gate_up), batch.adapters)

    def _attention(self, x_TD: Tensor, cos_TD: Tensor, sin_TD: Tensor, batch: Batch) -> Tensor:
        heads_TW = self._normed(self.qkv(x_TD, batch.adapters))
        num_q, num_kv = self.num_heads
        turned_THD, v_TGD = rotate(heads_TW, cos_TD, sin_TD, num_q + num_kv)
        q_THD, k_TGD = turned_THD.split([num_q, num_kv], dim=1)
        return self.out(batch.attention.attend(self.index, q_THD, k_TGD, v_TGD), batch.adapters)

    def _normed(self, heads_TW: Tensor) -> Tensor:
        """The same heads with q and k normalised, where the checkpoint does so (Qwen3)."""
        if self.q_norm_D is None or self.k_norm_D is None:
            return heads_TW
        sizes = [part.stop - part.start for part in self.qkv.parts]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in heads_TW.split(sizes, dim=-1))
        q, k = rms_norm(q, self.q_norm_D, self.eps), rms_norm(k, self.k_norm_D, self.eps)
        return torch.cat((q, k, v), dim=1).flatten(1)


class DenseModel:
    """A resident dense base; implements `models.model.Model`."""

    def __init__(
        self, config: PretrainedConfig, weights: Weights, serves_int8: bool = False
    ) -> None:
        _check(config)
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.layers = [
            DenseLayer(config, weights, i, serves_int8) for i in range(config.num_hidden_layers)
        ]
        self.final_norm_D = weights["model.norm.weight"]
        head_VD = self.embedding_VD if config.tie_word_embeddings else weights["lm_head.weight"]
        self.head = lora_linear("unembed", [("lm_head", head_VD, None)], serves_int8)
        self.eps = config.rms_norm_eps
        self.window = _window(config)
        self.rotary = Rotary(config, _head_dim(config), str(self.embedding_VD.device))
        self.cache_shape = CacheShape(
            config.num_hidden_layers, config.num_key_value_heads, _head_dim(config)
        )
        suits = TiledDense.suits(self)
        self._tiled = TiledDense(self) if suits else None
        self._training = TiledTraining(self) if suits else None

    @property
    def linears(self) -> list[LoraLinear]:
        """Every linear layer but the head, in order."""
        return [x for y in self.layers for x in (y.qkv, y.out, y.gate_up, y.down)]

    @property
    def targets(self) -> tuple[TargetModule, ...]:
        return tuple(target for linear in (*self.linears, self.head) for target in linear.targets)

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
        x_TD = F.embedding(tokens_T, self.embedding_VD)
        return self._tiled.forward(x_TD, positions_T, pages, adapters)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: Batch) -> Tensor:
        x_TD = F.embedding(tokens_T, self.embedding_VD)
        if torch.is_grad_enabled():
            x_TD.requires_grad_()  # nothing frozen asks for a gradient, so the graph starts here
        if self._training is not None and isinstance(batch.attention, PackedAttention):
            return self._training.forward(x_TD, positions_T, batch)
        cos_TD, sin_TD = self.rotary.at(positions_T, x_TD.dtype)
        for layer in self.layers:
            x_TD = layer.forward(x_TD, cos_TD, sin_TD, batch)
        return rms_norm(x_TD, self.final_norm_D, self.eps)


def _head_dim(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _window(config: PretrainedConfig) -> int | None:
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _check(config: PretrainedConfig) -> None:
    """Refuse by name what this family does not compute."""
    if config.hidden_act != "silu":
        raise InvalidRequest(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        listed = ", ".join(sorted(kinds))
        raise InvalidRequest(f"layers of different attention kinds are not supported: {listed}")
