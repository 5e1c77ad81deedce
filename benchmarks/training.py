"""How many tokens a second does a training step take, against PEFT and against bare GEMMs?

And what does it cost that four policies share the step? `python -m benchmarks training`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.house import Race, Readings, Report, Target, report_of
from benchmarks.processes import BASES, THREADS, Stage
from openmint.config import WorkerConfig
from openmint.models.embedded import embedded_base

SEQUENCES, LENGTH = 8, 256
MIXED_LENGTHS = (LENGTH, LENGTH // 2)
"""A micro-batch of 512 tokens has room for two policies of one, and for four of the other."""
POLICIES = 4
MICRO_BATCH_TOKENS = WorkerConfig().micro_batch_tokens
TITLE = "Training: one step of SmolLM2-135M with rank-8 adapters"
MEASURED = (
    "Forward and backward of 8 sequences of 256 random tokens, every token weighted, "
    "cross-entropy, rank 8 on all linear layers of attention and MLP (second table: on the output "
    "layer too), bf16, through `Engine.open_train`, `train` and `close_train` in micro-batches of "
    f"{MICRO_BATCH_TOKENS} tokens. The optimizer's step is timed apart. PEFT computes in bf16 "
    "(adapter too, no autocast), SDPA, fused AdamW; the fastest of its batchings is the rival. "
    "The GEMM ceiling is every matrix product of the step run bare at the same micro-batch, each "
    "in the fastest of the ways tried (`benchmarks/arms/ceiling.py`), all cores on each product "
    f"(1 lane) or each core on its own rows ({THREADS} lanes), whichever is faster. The target "
    "takes the ceiling without the products of attention and adapters, the stricter one."
)
LIMITS = (
    "Random tokens: the loss starts near the base's on noise; speed doesn't depend on it.",
    "The ceiling's inputs stay in cache, and it writes no result that anything reads.",
)


def races(stage: Stage, base: str) -> list[Race]:
    return [
        step_race(stage, base, unembed=False),
        step_race(stage, base, unembed=True),
        *(mixed_race(stage, base, length) for length in MIXED_LENGTHS),
    ]


def step_race(stage: Stage, base: str, unembed: bool) -> Race:
    """Ours, PEFT and the ceilings on one policy's step."""
    suffix = ", output layer too" if unembed else ""
    size: dict[str, Any] = {"base": base, "sequences": SEQUENCES, "length": LENGTH}
    ours = f"ours{suffix}"
    peft = {
        f"PEFT, {each} a forward{suffix}": {**size, "per_forward": each, "unembed": unembed}
        for each in (SEQUENCES, 2, 1)
    }
    bare, fuller = (
        {
            f"{products} in {lanes} lane{'s' if lanes > 1 else ''}{suffix}": {
                **size,
                "micro_batch_tokens": MICRO_BATCH_TOKENS,
                "unembed": unembed,
                "extras": extras,
                "lanes": lanes,
            }
            for lanes in (1, THREADS)
        }
        for products, extras in (("GEMMs", False), ("GEMMs, attention, adapters", True))
    )
    work = f"training {SEQUENCES}x{LENGTH}{suffix}"
    return Race(
        title=f"One policy, {SEQUENCES}x{LENGTH} tokens{suffix}",
        arms=[
            stage.arm("ours", ours, "train", **size, unembed=unembed),
            *(stage.arm("peft", name, "train", **how) for name, how in peft.items()),
            *(stage.arm("ceiling", name, "train", **how) for name, how in bare.items()),
            *(stage.arm("ceiling", name, "train", **how) for name, how in fuller.items()),
        ],
        targets=[
            Target(f"{work}: PEFT bf16", ours, tuple(peft), 2.5),
            Target(f"{work}: PEFT bf16, the same batch in one forward", ours, (next(iter(peft)),)),
            Target(f"{work}: GEMM ceiling", ours, tuple(bare), 0.8),
            Target(f"{work}: GEMMs with attention and adapters", ours, tuple(fuller)),
        ],
        columns={"optimizer step, ms": "optimizer_ms"},
        check=lambda readings: [
            *same_loss(readings),
            *(sentence for name in bare for sentence in ways_taken(readings, name)),
        ],
    )


def mixed_race(stage: Stage, base: str, length: int) -> Race:
    """One policy against four that share a step of as many tokens."""
    sequences = SEQUENCES * LENGTH // length
    size: dict[str, Any] = {"base": base, "sequences": sequences, "length": length}
    at = f"{sequences}x{length}"
    one, planned, mixed = (f"{who}, {at}" for who in ("one policy", "four, planned", "four, mixed"))
    work = f"four policies in one step, {at}"
    return Race(
        title=f"Four policies in one step, {at} tokens",
        arms=[
            stage.arm("ours", one, "train", **size),
            stage.arm("ours", planned, "train", **size, policies=POLICIES),
            stage.arm("ours", mixed, "train", **size, policies=POLICIES, mixed=True),
        ],
        targets=[
            Target(f"{work}: as many policies in a micro-batch as fit", mixed, (one,), 0.95),
            Target(f"{work}: as the scheduler packs them", planned, (one,), 0.95),
        ],
        columns={"optimizer steps, ms": "optimizer_ms"},
        check=same_loss,
    )


def same_loss(readings: Readings) -> list[str]:
    """The first counted loss of each arm that has one."""
    losses = [
        f"{name} {first.facts['loss_per_token']:.3f}"
        for name, (first, *_) in readings.items()
        if "loss_per_token" in first.facts
    ]
    return [f"Loss per token in the first repeat: {'; '.join(losses)}."] if losses else []


def ways_taken(readings: Readings, ceiling: str) -> list[str]:
    """How the ceiling computes each product."""
    if ceiling not in readings:
        return []
    ways = readings[ceiling][0].facts["ways"]
    taken = "; ".join(f"{name}: {way}" for name, way in ways.items())
    return [f"Fastest ways found for {ceiling}: {taken}."]


def ask(stage: Stage, repeats: int) -> Report:
    base = str(embedded_base(BASES))
    results = [stage.race(race, repeats) for race in races(stage, base)]
    return report_of("training", TITLE, MEASURED, results, LIMITS)
