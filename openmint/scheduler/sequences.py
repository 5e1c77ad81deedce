"""Sequences being generated, and the sample works that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from openmint.engine.plan import Chunk, ChunkOutcome, Draw, PromptScored, PromptScores
from openmint.scheduler.pages import PageKey
from openmint.scheduler.work import SampleWork
from openmint.types import Digest, IntArray, SampledSequence, Tenant, TopLogprobs

DecodeText = Callable[[list[int]], str]
StopReason = Literal["stop", "length"]


@dataclass(eq=False)
class Sequence:
    """One completion in the making: its tokens, its pages, and how far it has been computed."""

    sequence_id: int
    work_id: int
    sample_index: int
    work: SampleWork
    tokens: list[int]
    """The prompt, then the completion."""
    num_prompt: int
    keys: list[PageKey] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in `pages`."""
    num_cached: int = 0
    """Prompt tokens that were in the prefix cache when it was first admitted."""
    was_admitted: bool = False
    made_room: bool = False
    """Others were sent back to wait for it, which happens at most once."""
    num_scored: int = 0
    """Prompt rows already scored, so that a preempted prompt isn't scored twice."""
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopLogprobs] = field(default_factory=list)
    scored: list[PromptScored] = field(default_factory=list)
    stop_reason: StopReason | None = None
    routes: bytes = b""
    """What its computed tokens chose, once it is done."""

    @property
    def tenant(self) -> Tenant:
        return self.work.tenant

    @property
    def revision(self) -> Digest | None:
        return self.work.revision

    @property
    def num_completion(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def wants_scores(self) -> bool:
        work = self.work
        wanted = work.prompt_logprobs or work.topk_prompt_logprobs or work.prompt_alternatives
        given = work.target_prompt_logprobs_NK is not None
        return self.sample_index == 0 and (bool(wanted) or given)

    def chunk(self, stop: int) -> Chunk:
        """The engine's work for tokens `num_computed:stop`."""
        start = self.num_computed
        draw = self._draw() if stop == len(self.tokens) else None
        tokens_N = np.array(self.tokens[start:stop], dtype=np.int64)
        scores = self._scores(start, stop)
        pages = tuple(self.pages)
        return Chunk(self.sequence_id, tokens_N, start, pages, self.revision, draw, scores)

    def _draw(self) -> Draw:
        params = self.work.params
        return Draw(
            params.temperature,
            params.top_k,
            params.top_p,
            params.seed + self.sample_index,
            self.num_completion,
            self.work.topk_sample_logprobs,
        )

    def _scores(self, start: int, stop: int) -> PromptScores | None:
        first, last = max(start, self.num_scored), min(stop, self.num_prompt - 1)
        if not self.wants_scores or first >= last:
            return None
        next_tokens_N = np.array(self.tokens[first + 1 : last + 1], dtype=np.int64)
        wanted: IntArray | None = self.work.target_prompt_logprobs_NK
        candidates_NK = None if wanted is None else wanted[first:last]
        num_top, drawn = self.work.topk_prompt_logprobs, self._alternatives()
        return PromptScores(first - start, next_tokens_N, num_top, candidates_NK, drawn)

    def _alternatives(self) -> tuple[Draw, ...]:
        """Untruncated draws; positions far apart, so that no two draws share their number."""
        params = self.work.params
        return tuple(
            Draw(params.temperature, -1, 1.0, params.seed, (i + 1) << 32, 0)
            for i in range(self.work.prompt_alternatives)
        )

    def absorb(self, outcome: ChunkOutcome, stop: int, decode: DecodeText) -> None:
        """Take in what the engine made of the chunk that ended at `stop`."""
        self.num_computed = stop
        if outcome.scored is not None:
            self.scored.append(outcome.scored)
            self.num_scored = min(stop, self.num_prompt - 1)
        if outcome.token is None:
            return
        self.tokens.append(outcome.token)
        self.logprobs.append(outcome.logprob)
        if outcome.top is not None:
            self.tops.append(outcome.top)
        self.stop_reason = self._stop_reason(outcome.token, decode)

    def _stop_reason(self, token: int, decode: DecodeText) -> StopReason | None:
        params = self.work.params
        if token in params.stop_token_ids:
            return "stop"
        if params.stop_strings:
            # Text can change a few tokens back (multi-byte characters), so decode a generous tail.
            longest = max(len(text.encode()) for text in params.stop_strings)
            tail = self.tokens[self.num_prompt :][-(longest + 8) :]
            text = decode(tail)
            if any(stop in text for stop in params.stop_strings):
                return "stop"
        return "length" if self.num_completion >= params.max_tokens else None

    def result(self) -> SampledSequence:
        ids = np.array(self.tokens[self.num_prompt :], dtype=np.int64)
        top = None
        if self.tops:
            top = TopLogprobs(
                np.concatenate([top.token_ids_NK for top in self.tops]),
                np.concatenate([top.logprobs_NK for top in self.tops]),
            )
        assert self.stop_reason is not None
        logprobs_N = np.array(self.logprobs, dtype=np.float32)
        return SampledSequence(ids, logprobs_N, self.stop_reason, top, self.routes)
