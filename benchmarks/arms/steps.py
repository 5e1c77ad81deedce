"""How fast does an engine decode while all its sequences run? One definition for every arm.

An engine's steps are noted as they end, each with how many tokens it drew. Decoding is what happens
between the first and the last step that drew a token for every sequence: no prompt is computed in
that time, and no sequence has ended. Standard library and numpy only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 49_151
"""Ordinary tokens of SmolLM2: the ids below are special."""


def prompts(count: int, length: int, lap: int, round_: int) -> npt.NDArray[np.int64]:
    """The prompts of one round of a lap: new ones, as prompts seen before may be cached."""
    return token_rows(count, length, seed=(count, lap + 1, round_))


def token_rows(count: int, length: int, seed: int | tuple[int, ...]) -> npt.NDArray[np.int64]:
    """`count` rows of random tokens; the same seed gives every arm the same rows."""
    random = np.random.default_rng(seed)
    return random.integers(FIRST_TOKEN_ID, LAST_TOKEN_ID, (count, length), dtype=np.int64)


@dataclass
class StepLog:
    """The ends of one generation's steps. Make it just before the work begins."""

    num_sequences: int
    started_at: float = field(default_factory=time.perf_counter)
    ends: list[tuple[float, int]] = field(default_factory=list)
    """When each step ended, and how many tokens it drew."""

    def step(self, num_drawn: int) -> None:
        self.ends.append((time.perf_counter(), num_drawn))

    @property
    def decode(self) -> tuple[float, int]:
        """Seconds and tokens of the steps in which all sequences decoded."""
        full = [i for i, (_, drawn) in enumerate(self.ends) if drawn >= self.num_sequences]
        first, last = full[0], full[-1]
        tokens = sum(drawn for _, drawn in self.ends[first + 1 : last + 1])
        return self.ends[last][0] - self.ends[first][0], tokens

    @property
    def whole(self) -> tuple[float, int]:
        """Seconds and tokens from the start to the last token, prompts included."""
        return self.ends[-1][0] - self.started_at, sum(drawn for _, drawn in self.ends)


def decode_answer(logs: Sequence[StepLog], first_tokens: list[int]) -> dict[str, Any]:
    """What a decoding arm answers after its turn: see `protocol.py`."""
    decoded, whole = [log.decode for log in logs], [log.whole for log in logs]
    whole_tokens = sum(tokens for _, tokens in whole)
    return {
        "seconds": sum(seconds for seconds, _ in decoded),
        "tokens": sum(tokens for _, tokens in decoded),
        "whole_rate": whole_tokens / sum(seconds for seconds, _ in whole),
        "first_tokens": first_tokens,
    }
