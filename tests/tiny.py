"""Random models of each family, small enough to compare number by number; their adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from openmint.models.embedded import copy_tokenizer

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 49152,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {}),
    "qwen3-moe": ("Qwen3MoeConfig", {**ROUTED, "num_experts": 8, "norm_topk_prob": True}),
    "deepseek-v3.2": (
        "DeepseekV32Config",
        {
            **ROUTED,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "index_topk": 8,
            "index_n_heads": 16,
            "index_head_dim": 32,
        },
    ),
}

WIDTH, KEYS, LAYERS = 64, 32, 2
ATTENTION = {"q_proj": WIDTH, "k_proj": KEYS, "v_proj": KEYS, "o_proj": WIDTH}


def make_tiny_base(family: str, directory: Path, tokenizer_from: Path) -> Path:
    """A folder that `--base` takes, made once; weights are seeded, so it is the same each time."""
    if (directory / "config.json").is_file():
        return directory
    import torch
    import transformers

    name, extra = CONFIGS[family]
    config = getattr(transformers, name)(**{**COMMON, **extra})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # Norm weights of exactly one would hide a norm that is never applied.
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    copy_tokenizer(tokenizer_from, directory)
    return directory


def write_adapter(folder: Path, seed: int, rank: int = 1) -> Path:
    """A PEFT folder of a tiny base's attention."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, num_out in ATTENTION.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a, b = random.standard_normal((rank, WIDTH)), random.standard_normal((num_out, rank))
            tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": list(ATTENTION)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder
