"""What the readers of a family's adapters (PEFT, vLLM, SGLang) want its routed experts to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from openmint.types import EXPERT

Experts = Literal["each", "fused"]
"""A tensor for each expert, or one for all of a layer."""


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """The files of one family."""

    module: str = "mlp"
    """What holds the experts, where they are written one by one."""
    leaves: Mapping[str, str] = field(default_factory=dict)
    """Names of an expert's own, where they aren't ours."""
    default: Experts = "each"
    """The layout of an export that nobody asks for another of."""
    reads_each: bool = True
    """Whether PEFT can put experts together that are written one by one."""
    alternates: bool = False
    """Whether rows of gate and up alternate in `gate_up_proj`."""

    def name_of(self, path: str) -> str:
        """What a file of experts one by one calls this module."""
        if not EXPERT.search(path):
            return path
        stem, _, leaf = path.rpartition(".")
        stem = stem.replace(".mlp.experts.", f".{self.module}.experts.")
        return f"{stem}.{self.leaves.get(leaf, leaf)}"


USUAL = ExpertFiles()
AS_MIXTRAL = ExpertFiles(
    module="block_sparse_moe", leaves={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
)
AS_GPT_OSS = ExpertFiles(default="fused", reads_each=False, alternates=True)

BY_ARCHITECTURE = {
    "MixtralForCausalLM": AS_MIXTRAL,
    "MiniMaxM2ForCausalLM": AS_MIXTRAL,
    "GptOssForCausalLM": AS_GPT_OSS,
}
"""Families that are not `USUAL`."""


def expert_files(architecture: str) -> ExpertFiles:
    return BY_ARCHITECTURE.get(architecture, USUAL)
