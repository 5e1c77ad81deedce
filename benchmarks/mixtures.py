"""How fast do bases with experts train, and how fast do they and latents decode, against
`transformers`?

`python -m benchmarks mixtures`. Random bases of a middling size, made once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.decode import same_first_tokens
from benchmarks.house import Race, Report, Target, report_of
from benchmarks.processes import BASES, Stage
from benchmarks.training import same_loss
from openmint.models.embedded import copy_tokenizer, embedded_base

SEQUENCES, LENGTH, POLICIES = 8, 128, 4
CONTEXT, TOKENS_OUT, DECODING = 1024, 33, 4
PROMPT, TOGETHER = 128, (1, 8, 32)
VOCABULARY = 49_152
EXPERTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
LATENTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
TITLE = "Experts and latents: random bases of a middling size"
MEASURED = (
    f"Training: forward and backward of {SEQUENCES} sequences of {LENGTH} random tokens, "
    "cross-entropy, rank 8 on attention and all experts, bf16, on a random Qwen3-MoE of 12 layers "
    "of 32 experts, 4 of them a token's (0.67 B parameters). PEFT trains the experts as 3D "
    "parameters (`target_parameters`), where gate and up share their A; ours have one each. "
    f"Decoding: {DECODING} sequences of {CONTEXT} random tokens, {TOKENS_OUT - 1} steps of all of "
    "them, greedy, on a random DeepSeek-V3 of 12 layers with a latent of 256 + 32 values a token. "
    "`transformers` caches latents too, and makes keys and values of all of them in each step. "
    f"Decoding experts: {PROMPT} random tokens each, {TOKENS_OUT - 1} greedy steps, on the "
    "Qwen3-MoE. "
    "Two threads everywhere."
)
LIMITS = (
    "Random weights and tokens: routers choose about evenly, which real ones need not.",
    "A base of hundreds of experts would leave each fewer rows, and so slower products.",
)


def base_folder(name: str, config_class: str, shape: dict[str, Any]) -> str:
    """A folder of random weights, made once."""
    folder = BASES / "random" / name
    if not (folder / "config.json").is_file():
        _make(folder, config_class, shape)
    return str(folder)


def _make(folder: Path, config_class: str, shape: dict[str, Any]) -> None:
    import torch
    import transformers

    config = getattr(transformers, config_class)(
        **shape,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    copy_tokenizer(embedded_base(BASES), folder)


def train_race(stage: Stage, base: str) -> Race:
    size: dict[str, Any] = {"base": base, "sequences": SEQUENCES, "length": LENGTH}
    peft = {
        f"PEFT, {each} a forward": {**size, "per_forward": each, "experts": True}
        for each in (SEQUENCES, 2)
    }
    one, four = "ours, one policy", f"ours, {POLICIES} policies"
    work = f"training experts, {SEQUENCES}x{LENGTH}"
    return Race(
        title=f"Training a mixture of experts, {SEQUENCES}x{LENGTH} tokens",
        arms=[
            stage.arm("ours", one, "train", **size),
            stage.arm("ours", four, "train", **size, policies=POLICIES, mixed=True),
            *(stage.arm("peft", name, "train", **how) for name, how in peft.items()),
        ],
        targets=[
            Target(f"{work}: PEFT bf16", one, tuple(peft), 2.0),
            Target(f"{work}: {POLICIES} policies mixed against one", four, (one,), 0.9),
        ],
        columns={"optimizer step, ms": "optimizer_ms"},
        check=same_loss,
    )


def decode_race(
    stage: Stage, base: str, title: str, work: str, arms: tuple[str, str], **size: int
) -> Race:
    """Ours against `transformers`."""
    ours, theirs = arms
    return Race(
        title=title,
        arms=[
            stage.arm("ours", ours, "decode", base=base, tokens_out=TOKENS_OUT, **size),
            stage.arm("peft", theirs, "decode", base=base, tokens_out=TOKENS_OUT, **size),
        ],
        targets=[Target(f"{work}: transformers", ours, (theirs,), 1.0)],
        columns={"with prompts, tokens/s": "whole_rate"},
    )


def latents_race(stage: Stage, base: str) -> Race:
    title = f"Decoding latents, {DECODING} sequences at {CONTEXT} tokens"
    work, arms = f"latent decode at {CONTEXT}", ("ours, absorbed", "transformers, expanded")
    return decode_race(stage, base, title, work, arms, sequences=DECODING, tokens_in=CONTEXT)


def experts_race(stage: Stage, base: str, sequences: int) -> Race:
    at = f"{sequences} sequence{'s' if sequences > 1 else ''}"
    title = f"Decoding a mixture of experts, {at} at {PROMPT} tokens"
    work, arms = f"decoding experts, {at}", (f"ours, {at}", f"transformers, {at}")
    race = decode_race(stage, base, title, work, arms, sequences=sequences, tokens_in=PROMPT)
    return replace(race, check=lambda readings: same_first_tokens(readings, arms[0], arms[1:]))


def ask(stage: Stage, repeats: int) -> Report:
    mixture = base_folder("mixture-0.7b", "Qwen3MoeConfig", EXPERTS)
    latent = base_folder("latent", "DeepseekV3Config", LATENTS)
    races = [train_race(stage, mixture), latents_race(stage, latent)]
    races += [experts_race(stage, mixture, sequences) for sequences in TOGETHER]
    return report_of(
        "mixtures", TITLE, MEASURED, [stage.race(race, repeats) for race in races], LIMITS
    )
