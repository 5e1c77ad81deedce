"""One sampling step: prefill chunks and decode tokens of many sequences and adapters together.

Shapes: T packed tokens, S chunks (one per sequence), R rows whose logits are wanted, V vocabulary,
L padded chunk length, P pages, K cached positions, N tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from openmint.engine.plan import Chunk, ChunkOutcome, Draw, PromptScored, SampleBatch
from openmint.layers.adapters import AdapterBatch, AdapterStack, AdapterWeights
from openmint.layers.attention import (
    KVCache,
    PagedAttention,
    PagedGroup,
    length_buckets,
    score_mask,
)
from openmint.models.model import Batch, Model
from openmint.types import AnyArray, Digest, IntArray, TopLogprobs

SCORE_ROWS = 256
"""Prompt rows whose logits exist at once."""


class Sampler:
    """Runs sample batches on one model and its page cache. Owned by the engine's thread."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._device = model.head.weight_OI.device
        self._stack = AdapterStack([])

    @torch.inference_mode()
    def run(self, batch: SampleBatch, slots: Mapping[Digest, AdapterWeights]) -> list[ChunkOutcome]:
        """Outcome of each chunk, in order."""
        chunks = batch.chunks
        slot_S = self._bind(chunks, slots)
        lengths_S = np.array([len(chunk.tokens_N) for chunk in chunks])
        adapters = self._adapters(np.repeat(slot_S, lengths_S))
        tokens_T = np.concatenate([chunk.tokens_N for chunk in chunks])
        positions = [np.arange(c.start, c.start + len(c.tokens_N)) for c in chunks]
        positions_T = np.concatenate(positions)
        attention = self._attention(chunks, positions)
        hidden_TD = self._model.forward(
            self._to(tokens_T), self._to(positions_T), Batch(attention, adapters)
        )
        ends_S = np.cumsum(lengths_S)
        drawn = self._draw(chunks, hidden_TD, ends_S - 1, slot_S)
        outcomes = []
        for i, chunk in enumerate(chunks):
            scored = self._score(chunk, hidden_TD[ends_S[i] - lengths_S[i] : ends_S[i]], slot_S[i])
            token, logprob, top = drawn.get(i, (None, 0.0, None))
            ran = self._stack.adapters[slot_S[i]].revision if slot_S[i] >= 0 else None
            outcomes.append(ChunkOutcome(chunk.sequence_id, ran, token, logprob, top, scored))
        return outcomes

    def forget(self) -> None:
        """Drop the stacked copies of adapters, so that an evicted one's memory is free."""
        self._stack = AdapterStack([])

    def _bind(self, chunks: Sequence[Chunk], slots: Mapping[Digest, AdapterWeights]) -> IntArray:
        """Each chunk's slot in the stack. The stack is kept while it holds all that is asked."""
        wanted = {chunk.revision for chunk in chunks if chunk.revision is not None}
        held = [weights.revision for weights in self._stack.adapters]
        if not wanted <= set(held) or len(held) > 2 * len(wanted):
            self._stack = AdapterStack([slots[revision] for revision in wanted])
            held = list(wanted)
        slot_of = {revision: slot for slot, revision in enumerate(held)}
        return np.array([slot_of[c.revision] if c.revision else -1 for c in chunks])

    def _adapters(self, slot_T: IntArray) -> AdapterBatch | None:
        if (slot_T < 0).all():
            return None
        return AdapterBatch(self._stack, self._to(slot_T))

    def _attention(self, chunks: Sequence[Chunk], positions: Sequence[IntArray]) -> PagedAttention:
        page_tokens = self._cache.page_tokens
        starts_S = np.cumsum([0, *(len(chunk.tokens_N) for chunk in chunks)])
        slot_T = np.concatenate(
            [
                np.asarray(chunk.pages)[at // page_tokens] * page_tokens + at % page_tokens
                for chunk, at in zip(chunks, positions, strict=True)
            ]
        )
        buckets = length_buckets([len(chunk.tokens_N) for chunk in chunks])
        groups = [
            self._group([(chunks[i], int(starts_S[i])) for i in bucket]) for bucket in buckets
        ]
        return PagedAttention(self._cache, self._to(slot_T), groups)

    def _group(self, members: Sequence[tuple[Chunk, int]]) -> PagedGroup:
        page_tokens = self._cache.page_tokens
        lengths_S = np.array([len(chunk.tokens_N) for chunk, _ in members])
        steps_L = np.arange(lengths_S.max())
        rows_S = np.array([row for _, row in members])
        real_SL = steps_L < lengths_S[:, None]
        query_SL = rows_S[:, None] + np.minimum(steps_L, lengths_S[:, None] - 1)
        starts_S = np.array([chunk.start for chunk, _ in members])
        num_pages = -(-int((starts_S + lengths_S).max()) // page_tokens)
        pages_SP = np.zeros((len(members), num_pages), dtype=np.int64)
        for i, (chunk, _) in enumerate(members):
            used = chunk.pages[:num_pages]
            pages_SP[i, : len(used)] = used
        at_SL = starts_S[:, None] + np.minimum(steps_L, lengths_S[:, None] - 1)
        keys_K = np.arange(num_pages * page_tokens)
        sees_SLK = keys_K <= at_SL[:, :, None]
        if self._model.window is not None:
            sees_SLK &= keys_K > at_SL[:, :, None] - self._model.window
        query, real, pages, sees = map(self._to, (query_SL, real_SL, pages_SP, sees_SLK))
        shared = self._model.num_heads // self._model.cache_shape.num_kv_heads
        mask_S1QK = score_mask(sees, shared, self._cache.keys.dtype)
        return PagedGroup(query, real, pages, mask_S1QK)

    def _draw(
        self, chunks: Sequence[Chunk], hidden_TD: Tensor, last_S: IntArray, slot_S: IntArray
    ) -> dict[int, tuple[int, float, TopLogprobs | None]]:
        """Next token, its log-probability and alternatives, for the chunks that draw one."""
        drawing = [i for i, chunk in enumerate(chunks) if chunk.draw is not None]
        if not drawing:
            return {}
        logprobs_RV = self._logprobs(hidden_TD[self._to(last_S[drawing])], slot_S[drawing])
        draws = [draw for chunk in chunks if (draw := chunk.draw) is not None]
        tokens_R = choose_tokens(logprobs_RV, draws)
        chosen_R = logprobs_RV.gather(1, tokens_R[:, None]).squeeze(1).cpu().numpy()
        width = max(draw.num_top_logprobs for draw in draws)
        tops = _top(logprobs_RV, width) if width else None
        drawn = {}
        for row, i in enumerate(drawing):
            num_top = draws[row].num_top_logprobs
            top = _narrow(tops, slice(row, row + 1), num_top) if tops and num_top else None
            drawn[i] = (int(tokens_R[row]), float(chosen_R[row]), top)
        return drawn

    def _score(self, chunk: Chunk, hidden_ND: Tensor, slot: int) -> PromptScored | None:
        """Log-probabilities of the prompt tokens that follow this chunk's rows."""
        if chunk.scores is None:
            return None
        scores, parts = chunk.scores, []
        hidden_ND = hidden_ND[scores.first_row :]
        for start in range(0, len(scores.next_tokens_N), SCORE_ROWS):
            rows = slice(start, min(start + SCORE_ROWS, len(scores.next_tokens_N)))
            slot_R = np.full(rows.stop - rows.start, slot)
            logprobs_RV = self._logprobs(hidden_ND[rows], slot_R)
            next_R1 = self._to(scores.next_tokens_N[rows])[:, None]
            own = logprobs_RV.gather(1, next_R1).squeeze(1).cpu().numpy()
            top = _top(logprobs_RV, scores.num_top) if scores.num_top else None
            candidates = None
            if scores.candidates_NK is not None:
                wanted_RK = self._to(scores.candidates_NK[rows])
                found_RK = logprobs_RV.gather(1, wanted_RK.clamp(min=0))
                candidates = found_RK.masked_fill(wanted_RK < 0, float("nan")).cpu().numpy()
            place = chunk.start + scores.first_row + rows.start
            drawn = draw_alternatives(logprobs_RV, scores.alternatives, place)
            parts.append(PromptScored(own, top, candidates, drawn))
        return join_scores(parts)

    def _logprobs(self, hidden_RD: Tensor, slot_R: IntArray) -> Tensor:
        logits_RV = self._model.head(hidden_RD, self._adapters(slot_R))
        return torch.log_softmax(logits_RV.float(), dim=-1)

    def _to(self, array: AnyArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def draw_alternatives(
    logprobs_RV: Tensor, alternatives: Sequence[Draw], place: int
) -> TopLogprobs | None:
    """One token per row and wanted draw; row 0 stands at `place` in the prompt."""
    if not alternatives:
        return None
    columns = []
    for wanted in alternatives:
        rows = range(len(logprobs_RV))
        draws = [replace(wanted, position=wanted.position + place + row) for row in rows]
        columns.append(choose_tokens(logprobs_RV, draws))
    tokens_RK = torch.stack(columns, dim=1)
    return TopLogprobs(tokens_RK.cpu().numpy(), logprobs_RV.gather(1, tokens_RK).cpu().numpy())


def choose_tokens(logprobs_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The token that each row's settings draw.

    The row's uniform number depends on its seed and position alone, so a sequence draws the same
    tokens whatever it is batched with.
    """
    tokens_R = logprobs_RV.argmax(dim=-1)
    warm = [row for row, draw in enumerate(draws) if draw.temperature > 0.0]
    if not warm:
        return tokens_R
    device = logprobs_RV.device
    heat_W = torch.tensor([draws[row].temperature for row in warm], device=device)
    scaled_WV = logprobs_RV[warm] / heat_W[:, None]
    picky = [i for i, row in enumerate(warm) if draws[row].top_k > 0 or draws[row].top_p < 1.0]
    for i in picky:
        draw = draws[warm[i]]
        scaled_WV[i] = truncate(scaled_WV[i], draw.top_k, draw.top_p)
    cumulative_WV = scaled_WV.softmax(dim=-1).cumsum(dim=-1)
    uniform = [uniform_at(draws[row].seed, draws[row].position) for row in warm]
    uniform_W = torch.tensor(uniform, dtype=torch.float32, device=device)
    threshold_W1 = (uniform_W * cumulative_WV[:, -1])[:, None]
    drawn_W = torch.searchsorted(cumulative_WV, threshold_W1, right=True).squeeze(1)
    tokens_R[warm] = drawn_W.clamp(max=logprobs_RV.shape[1] - 1)
    return tokens_R


def truncate(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with all but the k likeliest, then all beyond mass p, at -inf; one always stays."""
    sorted_V, order_V = logits_V.sort(descending=True)
    keep_V = torch.ones_like(sorted_V, dtype=torch.bool)
    if top_k > 0:
        keep_V[top_k:] = False
    if top_p < 1.0:
        probs_V = sorted_V.masked_fill(~keep_V, float("-inf")).softmax(dim=-1)
        keep_V &= probs_V.cumsum(dim=-1) - probs_V < top_p
    return torch.full_like(logits_V, float("-inf")).scatter_(0, order_V[keep_V], sorted_V[keep_V])


def uniform_at(seed: int, position: int) -> float:
    """A uniform number in [0, 1) from a counter: SplitMix64's finaliser (Steele et al., 2014)."""
    mask = (1 << 64) - 1
    x = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) >> 40) / (1 << 24)


def join_scores(parts: Sequence[PromptScored]) -> PromptScored | None:
    """Scores of consecutive rows as one."""
    if not parts:
        return None
    tops = [part.top for part in parts if part.top is not None]
    found = [part.candidates_NK for part in parts if part.candidates_NK is not None]
    drawn = [part.alternatives for part in parts if part.alternatives is not None]
    return PromptScored(
        np.concatenate([part.logprobs_N for part in parts]),
        join_tops(tops) if tops else None,
        np.concatenate(found) if found else None,
        join_tops(drawn) if drawn else None,
    )


def join_tops(tops: Sequence[TopLogprobs]) -> TopLogprobs:
    ids_NK = np.concatenate([top.token_ids_NK for top in tops])
    return TopLogprobs(ids_NK, np.concatenate([top.logprobs_NK for top in tops]))


def _top(logprobs_RV: Tensor, k: int) -> TopLogprobs:
    best = logprobs_RV.topk(k, dim=-1)
    return TopLogprobs(best.indices.cpu().numpy(), best.values.cpu().numpy())


def _narrow(top: TopLogprobs, rows: slice, k: int) -> TopLogprobs:
    return TopLogprobs(top.token_ids_NK[rows, :k], top.logprobs_NK[rows, :k])
