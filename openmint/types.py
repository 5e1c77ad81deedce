"""The nouns that every room shares. Standard library and numpy only.

Shape suffixes: T tokens, N positions of one datum, K candidates, S sequences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, NewType

import numpy as np
import numpy.typing as npt

Tenant = NewType("Tenant", str)
SessionId = NewType("SessionId", str)
RunId = NewType("RunId", str)
"""One training run, `<session>:train:<n>`; the Tinker wire calls it `model_id`."""
Digest = NewType("Digest", str)
"""`sha256:` and 64 hex digits of the bytes it names."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]

TargetGroup = Literal["attn", "mlp", "unembed"]


class Priority(IntEnum):
    """Whose load goes first; within one, the earlier deadline."""

    INTERACTIVE = 0
    BATCH = 1
    PREFETCH = 2


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What shape of adapter a policy trains. The update is `(alpha / rank) * B @ A`."""

    rank: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def groups(self) -> tuple[TargetGroup, ...]:
        flags: tuple[tuple[TargetGroup, bool], ...] = (
            ("attn", self.train_attn),
            ("mlp", self.train_mlp),
            ("unembed", self.train_unembed),
        )
        return tuple(group for group, wanted in flags if wanted)


@dataclass(frozen=True, slots=True)
class TargetModule:
    """One linear layer of a base that an adapter may change.

    `path` is its module path in the Hugging Face class, e.g. `model.layers.3.mlp.up_proj`.
    """

    path: str
    group: TargetGroup
    num_in: int
    num_out: int


LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
EXPERT = re.compile(r"(?<=experts\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class TargetStack:
    """Targets that differ in their layer and expert alone. All their A are one tensor, and all
    their B."""

    name: str
    """The path within a layer or expert, e.g. `mlp.up_proj`, `mlp.experts.up_proj`."""
    targets: tuple[TargetModule, ...]
    """Layer by layer, and in a layer expert by expert."""
    grid: tuple[int, ...]
    """`(layers,)`, or `(layers, experts)`."""

    @property
    def group(self) -> TargetGroup:
        return self.targets[0].group

    @property
    def num_in(self) -> int:
        return self.targets[0].num_in

    @property
    def num_out(self) -> int:
        return self.targets[0].num_out


def stacks_of(targets: Iterable[TargetModule]) -> tuple[TargetStack, ...]:
    """The targets as an adapter's tensors and its flat vector have them: in the order of names."""
    stacks: dict[str, dict[tuple[int, ...], TargetModule]] = {}
    for target in targets:
        places = [match for kind in (LAYER, EXPERT) if (match := kind.search(target.path))]
        name = EXPERT.sub("", LAYER.sub("", target.path))
        stacks.setdefault(name, {})[tuple(int(match[1]) for match in places)] = target
    return tuple(_stack(name, stacks[name]) for name in sorted(stacks))


def _stack(name: str, members: Mapping[tuple[int, ...], TargetModule]) -> TargetStack:
    assert len({(t.num_in, t.num_out) for t in members.values()}) == 1, f"{name} has several shapes"
    grid = tuple(len(set(axis)) for axis in zip(*members, strict=True)) or (1,)
    assert math.prod(grid) == len(members), f"{name} lacks experts in some layers"
    return TargetStack(name, tuple(members[place] for place in sorted(members)), grid)


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A resident base model as the control plane knows it; made by the worker that loaded it."""

    name: str
    digest: Digest
    architecture: str
    directory: str
    """Local Hugging Face folder: weights, config, tokenizer, chat template."""
    dtype: str
    device: str
    vocab_size: int
    context_length: int
    """Longest prompt plus completion, in tokens."""
    eos_token_ids: tuple[int, ...]
    num_params: int
    weight_bytes: int
    max_rank: int
    stacks: tuple[TargetStack, ...]

    def stacks_of(self, spec: LoraSpec) -> tuple[TargetStack, ...]:
        """The modules that `spec` adapts, as its adapter files have them."""
        return tuple(stack for stack in self.stacks if stack.group in spec.groups)

    def targets_of(self, spec: LoraSpec) -> tuple[TargetModule, ...]:
        """The modules that `spec` adapts."""
        return tuple(target for stack in self.stacks_of(spec) for target in stack.targets)

    def adapter_params(self, spec: LoraSpec) -> int:
        """Values of an adapter of the base."""
        stacks = self.stacks_of(spec)
        return spec.rank * sum(len(s.targets) * (s.num_in + s.num_out) for s in stacks)

    def adapter_bytes(self, spec: LoraSpec) -> int:
        """What an adapter of the base takes in host memory, in the precision of the base."""
        return self.adapter_params(spec) * self.weight_bytes // self.num_params


@dataclass(frozen=True, slots=True)
class AdamParams:
    """AdamW hyper-parameters of one `optim_step`; defaults are those of the Tinker SDK."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Global gradient norm above which the gradient is scaled down; 0 means never."""


@dataclass(frozen=True, slots=True)
class RecordedRoutes:
    """What the first tokens of a sequence chose when it was sampled."""

    record: bytes
    """As the engine encoded it."""
    num_tokens: int
    """So many of the record's tokens are those of the datum."""
    is_forced: bool = True
    """Whether training repeats them, or only says how far it is from them."""


@dataclass(frozen=True, slots=True)
class Datum:
    """One training example: `tokens_N` and the arrays that its loss reads, all dense."""

    tokens_N: IntArray
    inputs: Mapping[str, npt.NDArray[np.generic]]
    routes: RecordedRoutes | None = None


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss by its Tinker name, with the settings that differ from its defaults."""

    name: str
    config: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is drawn. `max_tokens` is always resolved before the engine sees it."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends after any of these, which stays in the output. Empty: none."""
    stop_strings: tuple[str, ...] = ()
    """Generation ends when one appears in the decoded completion; its tokens stay in the output."""


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The k likeliest tokens at each position; empty cells are token 0 at -inf."""

    token_ids_NK: IntArray
    logprobs_NK: FloatArray


@dataclass(frozen=True, slots=True)
class SampledSequence:
    tokens_N: IntArray
    logprobs_N: FloatArray
    """Of each sampled token under the model itself: temperature 1, no truncation."""
    stop_reason: Literal["stop", "length"]
    top_logprobs: TopLogprobs | None = None
    routes: bytes = b""
    """What all tokens but the last chose on their way, prompt included, as the engine encodes it;
    empty where there is nothing to choose."""
