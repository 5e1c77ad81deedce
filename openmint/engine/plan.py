"""What one engine step does, and what came of it: the words between scheduler and engine.

No torch here. Shapes: N tokens of a chunk, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

from openmint.types import Digest, FloatArray, IntArray, TopLogprobs


@dataclass(frozen=True, slots=True)
class TrainItem:
    """One datum of an opened train work."""

    work_id: int
    datum_index: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Data whose forward and backward pass run as one packed batch."""

    items: tuple[TrainItem, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Draw:
    """How the next token of a sequence is drawn. `position` counts its completion's tokens."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    position: int
    num_top_logprobs: int


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Which log-probabilities of prompt tokens a chunk must report.

    Row `first_row + i` of the chunk predicts `next_tokens_N[i]`. Rows before were scored by an
    earlier attempt; the row that ends the prompt has no next token.
    """

    first_row: int
    next_tokens_N: IntArray
    num_top: int
    candidates_NK: IntArray | None
    alternatives: tuple[Draw, ...] = ()
    """Draws wanted at every row, which adds its place in the prompt to `position`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: part of its prompt, or its newest token."""

    sequence_id: int
    tokens_N: IntArray
    start: int
    """Position of the first token; all earlier ones are in `pages`."""
    pages: tuple[int, ...]
    revision: Digest | None
    draw: Draw | None
    """None when more of the prompt is still to come."""
    scores: PromptScores | None = None


@dataclass(frozen=True, slots=True)
class SampleBatch:
    chunks: tuple[Chunk, ...]

    @property
    def revisions(self) -> list[Digest]:
        """Each one that it uses, once."""
        return list(dict.fromkeys(c.revision for c in self.chunks if c.revision is not None))


@dataclass(frozen=True, slots=True)
class PromptScored:
    logprobs_N: FloatArray
    top: TopLogprobs | None
    candidates_NK: FloatArray | None
    alternatives: TopLogprobs | None = None


@dataclass(frozen=True, slots=True)
class ChunkOutcome:
    sequence_id: int
    revision: Digest | None
    """Read from the slot that ran."""
    token: int | None
    logprob: float
    top: TopLogprobs | None
    scored: PromptScored | None
