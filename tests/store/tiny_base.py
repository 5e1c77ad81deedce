"""A tiny Llama, what a worker would say of it, and damage to adapter files."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers

from openmint.types import BaseInfo, Digest, TargetGroup, TargetModule, stacks_of

CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUP_OF: dict[str, TargetGroup] = {
    "q_proj": "attn",
    "k_proj": "attn",
    "v_proj": "attn",
    "o_proj": "attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
    "lm_head": "unembed",
}
LAYERS = [module for module in GROUP_OF if module != "lm_head"]


def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(CONFIG).eval()


def base_info(dtype: str = "float32") -> BaseInfo:
    targets = [
        TargetModule(path, GROUP_OF[leaf], module.in_features, module.out_features)
        for path, module in llama().named_modules()
        if (leaf := path.rpartition(".")[2]) in GROUP_OF
    ]
    digest, stacks = Digest("sha256:" + "ab" * 32), stacks_of(targets)
    return BaseInfo("tiny/llama", digest, "llama", "", dtype, "cpu", 96, 64, (2,), 1, 1, 8, stacks)


BASE = base_info()


def mutant(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes of its header, mostly, changed, cut, repeated or moved."""
    changed = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(header if rng.random() < 0.9 else len(changed))
        match rng.randrange(5):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + rng.randint(1, 9)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 9)]
            case 4:
                changed[at : at + 1] = rng.choice([b"[", b'"', b"-", b"1e9", b"9" * 20, b"null"])
        header = min(header, len(changed))
    return bytes(changed)
