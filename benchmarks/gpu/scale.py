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
)
