"""How many tokens a second does decoding give, against llama.cpp and against bare linear layers?

`python -m benchmarks decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.house import Arm, Race, Readings, Report, Target, report_of
from benchmarks.processes import BASES, Stage
from benchmarks.training import ways_taken
from openmint.models.embedded import embedded_base

TOKENS_IN, TOKENS_OUT = 64, 64
ROUNDS = {1: 4, 8: 2, 32: 1}
"""Sequences at once -> how often a turn generates, so that each turn takes seconds."""
LLAMA_AT_LEAST = {1: None, 8: 2.0, 32: 3.0}
INT8_WORKER: dict[str, Any] = {"serving_weights": "int8"}
"""The worker settings that make the serving base int8."""
TITLE = "Decoding SmolLM2-135M: 1, 8 and 32 sequences"
MEASURED = (
    f"{TOKENS_IN} random tokens in, {TOKENS_OUT} out, greedy, no token ends a sequence, new "
    "prompts in each repeat, the bare base. The rate counts the steps in which all sequences "
    "decode (`benchmarks/arms/steps.py`); `with prompts` is all tokens out over the whole time. "
    "Ours: scheduler and engine as in a worker, bf16, no HTTP. The ceiling: all linear layers and "
    "the output layer of such a step, bf16, bare, each in the fastest of the ways tried. "
    "llama.cpp: the same model as Q4_1, all sequences in one `llama_decode` a step; at one "
    "sequence its Python API too, and the faster is the rival. Two threads everywhere."
)
LIMITS = (
    "llama.cpp reads 4-bit weights where ours reads 16-bit ones: its answers differ a little.",
    "The ceiling's inputs stay in cache; attention, norms and sampling aren't in it.",
)


def decode_race(stage: Stage, base: str, sequences: int) -> Race:
    at = f"{sequences} sequence{'s' if sequences > 1 else ''}"
    size = {"sequences": sequences, "rounds": ROUNDS[sequences]}
    tokens = {"tokens_in": TOKENS_IN, "tokens_out": TOKENS_OUT}
    steps = TOKENS_OUT - 1
    ours, ceiling, int8 = f"ours, {at}", f"bare linear layers, {at}", f"ours, int8 base, {at}"
    arms: list[Arm] = [
        stage.arm("ours", ours, "decode", base=base, **size, **tokens),
        stage.arm("ceiling", ceiling, "decode", base=base, **size, steps=steps),
    ]
    llama = [f"llama.cpp, {at}"]
    arms.append(stage.arm("llama", llama[0], "decode", **size, **tokens))
    targets = [
        Target(f"decode, {at}: pre-packed ceiling", ours, (ceiling,), 0.75),
        Target(f"decode, {at}: llama.cpp", ours, tuple(llama), LLAMA_AT_LEAST[sequences]),
    ]
    if sequences == 1:
        llama.append(f"llama.cpp by its Python API, {at}")
        arms.append(stage.arm("llama", llama[1], "decode by the Python API", **size, **tokens))
        settings = {**size, **tokens, "worker": INT8_WORKER}
        arms.append(stage.arm("ours", int8, "decode", base=base, **settings))
        targets[1] = Target(f"decode, {at}: llama.cpp", ours, tuple(llama))
        targets.append(Target(f"decode, {at}, int8 base: llama.cpp", int8, tuple(llama), 1.0))
    return Race(
        title=f"Decode, {at}",
        arms=arms,
        targets=targets,
        columns={"with prompts, tokens/s": "whole_rate"},
        check=lambda readings: [
            *same_first_tokens(readings, ours, [*llama, int8]),
            *ways_taken(readings, ceiling),
        ],
    )


def same_first_tokens(readings: Readings, name: str, others: Sequence[str]) -> list[str]:
    """How often each other arm's first token is that of arm `name`, over the laps that both ran."""
    if name not in readings:
        return []
    found = []
    for other in others:
        if other not in readings:
            continue
        pairs = [
            pair
            for own, their in zip(readings[name], readings[other], strict=True)
            if own.lap == their.lap
            for pair in zip(own.facts["first_tokens"], their.facts["first_tokens"], strict=True)
        ]
        same = sum(own == their for own, their in pairs)
        found.append(f"First tokens of {other} equal those of {name}: {same} of {len(pairs)}.")
    return found


def ask(stage: Stage, repeats: int) -> Report:
    base = str(embedded_base(BASES))
    results = [stage.race(decode_race(stage, base, sequences), repeats) for sequences in ROUNDS]
    return report_of("decode", TITLE, MEASURED, results, LIMITS)
