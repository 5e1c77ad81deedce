"""How large is everything? The same questions at the size of Qwen3-4B, and tiny for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN3_4B: dict[str, Any] = {
    **COMMON,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
}
QWEN3_30B_EXPERTS: dict[str, Any] = {
    **QWEN3_4B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "tie_word_embeddings": False,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 12,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
"""Qwen3-30B-A3B but for its 48 layers: beside all of them four adapters of all experts don't train
in 78 GiB."""
DEEPSEEK_V3_LATENTS: dict[str, Any] = {
    **COMMON,
    "architectures": ["DeepseekV3ForCausalLM"],
    "tie_word_embeddings": False,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "vocab_size": 129_280,
    "max_position_embeddings": 4096,
}
"""DeepSeek-V3 but for its 61 layers and 256 experts."""
TINY_SHAPE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
TINY_EXPERTS: dict[str, Any] = {
    **TINY_SHAPE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
TINY_LATENTS: dict[str, Any] = {
    **DEEPSEEK_V3_LATENTS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "vocab_size": 512,
}


@dataclass(frozen=True, kw_only=True)
class Training:
    sequences: int
    length: int
    policies: tuple[int, ...]
    """How many policies share the sequences."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    batches: tuple[int, ...]
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, kw_only=True)
class Adapters:
    batches: dict[int, tuple[int, ...]]
    """Sequences at once -> numbers of distinct adapters; 0 is the bare base."""
    rank: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, kw_only=True)
class Handoff:
    tokens_in: int
    tokens_out: int
    requests: int
    handovers: int
    """New adapters handed over, one after another."""


@dataclass(frozen=True, kw_only=True)
class Grpo:
    policies: tuple[int, ...]
    steps: int
    groups: int
    group_size: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, kw_only=True)
class Mixtures:
    """Of bases with experts, and of one with latents."""

    experts: dict[str, Any]
    """The first one's shape."""
    worker: dict[str, Any]
    training: Training
    adapters: Adapters
    latents: dict[str, Any]
    latent_decoding: Decoding


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything that differs between a GPU and the tiny run."""

    name: str
    shape: dict[str, Any]
    device: str
    dtype: str
    worker: dict[str, Any]
    """Settings of `WorkerConfig` common to all questions."""
    repeats: int
    rank: int
    training: Training
    decoding: Decoding
    adapters: Adapters
    handoff: Handoff
    grpo: Grpo
    mixtures: Mixtures


FULL = Scale(
    name="Qwen3-4B shape",
    shape=QWEN3_4B,
    device="cuda",
    dtype="bfloat16",
    worker={
        "training_bytes": 16 * GIB,
        "host_bytes": 20 * GIB,
        "serving_bytes": 20 * GIB,
        "kv_cache_bytes": 8 * GIB,
        "step_tokens": 8192,
        "running_sequences": 512,
        "micro_batch_tokens": 4096,
    },
    repeats=5,
    rank=32,
    training=Training(sequences=8, length=1024, policies=(1, 8)),
    decoding=Decoding(batches=(1, 8, 32, 128), tokens_in=128, tokens_out=64),
    adapters=Adapters(
        batches={64: (0, 1, 64), 512: (0, 1, 64, 512)}, rank=8, tokens_in=32, tokens_out=24
    ),
    handoff=Handoff(tokens_in=32, tokens_out=64, requests=5, handovers=3),
    grpo=Grpo(policies=(1, 3, 8), steps=2, groups=4, group_size=8, tokens_in=64, tokens_out=96),
    mixtures=Mixtures(
        experts=QWEN3_30B_EXPERTS,
        worker={"training_bytes": 24 * GIB, "kv_cache_bytes": 2 * GIB},
        training=Training(sequences=8, length=1024, policies=(1, 4)),
        adapters=Adapters(
            batches={1: (0, 1), 8: (0, 8), 32: (0, 32)}, rank=16, tokens_in=32, tokens_out=24
        ),
        latents=DEEPSEEK_V3_LATENTS,
        latent_decoding=Decoding(batches=(1, 8), tokens_in=1024, tokens_out=24),
    ),
)
TINY = Scale(
    name="tiny",
    shape=TINY_SHAPE,
    device="cpu",
    dtype="float32",
    worker={"kv_cache_bytes": 4 * 2**20, "step_tokens": 256},
    repeats=2,
    rank=4,
    training=Training(sequences=4, length=24, policies=(1, 4)),
    decoding=Decoding(batches=(1, 4), tokens_in=8, tokens_out=6),
    adapters=Adapters(batches={4: (0, 1, 4)}, rank=2, tokens_in=8, tokens_out=6),
    handoff=Handoff(tokens_in=8, tokens_out=8, requests=3, handovers=2),
    grpo=Grpo(policies=(1, 2), steps=2, groups=2, group_size=2, tokens_in=6, tokens_out=6),
    mixtures=Mixtures(
        experts=TINY_EXPERTS,
        worker={},
        training=Training(sequences=4, length=24, policies=(1, 4)),
        adapters=Adapters(batches={1: (0, 1), 4: (0, 4)}, rank=2, tokens_in=8, tokens_out=6),
        latents=TINY_LATENTS,
        latent_decoding=Decoding(batches=(1, 4), tokens_in=12, tokens_out=6),
    ),
)
