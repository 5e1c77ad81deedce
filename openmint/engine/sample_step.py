"""One sampling step: prefill chunks and decode tokens of many sequences and adapters together.

Shapes: T packed tokens, S chunks (one per sequence), R rows whose logits are wanted, V vocabulary,
L padded chunk length, P pages, K cached positions, N tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from openmint.engine.lanes import Lanes
from openmint.engine.plan import Chunk, ChunkOutcome, Draw, PromptScored, SampleBatch
from openmint.engine.route_record import Recorder, RouteCache
from openmint.kernels import logprobs
from openmint.kernels.choice import use_triton
from openmint.kernels.team import Together, alone
from openmint.layers.adapters import AdapterBatch, AdapterStack, AdapterWeights
from openmint.layers.attention import (
    Attention,
    KVCache,
    PagedAttention,
    PagedGroup,
    Sight,
    TiledCache,
    TiledPages,
    length_buckets,
)
from openmint.layers.batch import Batch
from openmint.layers.linear import LogitsRoom
from openmint.models.model import Model
from openmint.types import AnyArray, Digest, FloatArray, IntArray, TopLogprobs

SCORE_ROWS = 256
"""Prompt rows whose logits exist at once."""


LANE_TOKENS = 64
"""Fewer tokens than this are not worth a lane of their own: a decode step is a third Python, which
lanes would wait for in turn (776 tokens/s uncut against 576 at 32 sequences beside a busy core)."""

Slots = Mapping[Digest, AdapterWeights]


class Sampler:
    """Runs sample batches on one model and its page cache. Owned by the engine's thread."""

    def __init__(
        self,
        model: Model,
        cache: KVCache | TiledCache,
        routes: RouteCache | None,
        lanes: Lanes,
    ) -> None:
        self._lanes = lanes
        # A tiled cache is read by kernels that all threads run together; no part is a lane's alone.
        num_parts = 1 if isinstance(cache, TiledCache) else lanes.count
        self._parts = [SampleLane(model, cache, routes) for _ in range(num_parts)]

    def run(self, batch: SampleBatch, slots: Slots) -> list[ChunkOutcome]:
        """Outcome of each chunk, in order. No chunk reads what another writes in the same step."""
        sizes = [len(chunk.tokens_N) for chunk in batch.chunks]
        cuts = self._lanes.split(sizes, LANE_TOKENS, len(self._parts))
        together = self._lanes.together if len(cuts) == 1 else alone
        shares = zip(self._parts, cuts, strict=False)
        jobs = [partial(lane.run, batch.chunks[cut], slots, together) for lane, cut in shares]
        return [outcome for outcomes in self._lanes.run(jobs) for outcome in outcomes]

    def forget(self) -> None:
        """Drop the stacked copies of adapters, so that an evicted one's memory is free."""
        for lane in self._parts:
            lane.forget()


class SampleLane:
    """A part of a sampling step: all of it, or one thread's share."""

    def __init__(
        self,
        model: Model,
        cache: KVCache | TiledCache,
        routes: RouteCache | None,
    ) -> None:
        self._model, self._cache, self._routes = model, cache, routes
        self._together: Together = alone
        self._device = model.head.device
        self._stack = AdapterStack([])
        self._room = LogitsRoom(model.head)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], slots: Slots, together: Together) -> list[ChunkOutcome]:
        """Outcome of each chunk, in order, by threads that share what kernels can."""
        self._together = together
        slot_S = self._bind(chunks, slots)
        lengths_S = np.array([len(chunk.tokens_N) for chunk in chunks])
        adapters = self._adapters(np.repeat(slot_S, lengths_S))
        tokens_T = np.concatenate([chunk.tokens_N for chunk in chunks])
        positions = [np.arange(c.start, c.start + len(c.tokens_N)) for c in chunks]
        positions_T = np.concatenate(positions)
        places = self._to(tokens_T), self._to(positions_T)
        if isinstance(self._cache, TiledCache):
            pages = self._tiled_pages(chunks, lengths_S, self._cache)
            hidden_TD = self._model.sample(*places, pages, adapters)
        else:
            attention = self._attention(chunks, positions, self._cache)
            recorder = Recorder() if self._routes else None
            batch = Batch(attention, adapters, recorder, together)
            hidden_TD = self._model.forward(*places, batch)
            if self._routes and recorder:
                slot_T = cache_places(chunks, positions, self._cache.page_tokens)
                self._routes.write(slot_T, recorder)
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
        self._stack = AdapterStack([])

    def _bind(self, chunks: Sequence[Chunk], slots: Slots) -> IntArray:
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

    def _tiled_pages(
        self, chunks: Sequence[Chunk], lengths_S: IntArray, cache: TiledCache
    ) -> TiledPages:
        blocks_SB = cache.blocks(page_table(chunks, cache.page_tokens))
        sequence_T = np.repeat(np.arange(len(chunks)), lengths_S)
        return TiledPages(cache, sequence_T, blocks_SB, self._together)

    def _attention(
        self, chunks: Sequence[Chunk], positions: Sequence[IntArray], cache: KVCache
    ) -> Attention:
        is_decode = all(len(at_N) == 1 for at_N in positions)
        if is_decode and cache.has_values and use_triton(self._device):
            from openmint.layers.decode_attention import DecodeAttention

            pages, at_S = [chunk.pages for chunk in chunks], np.concatenate(positions)
            return DecodeAttention.of(cache, pages, at_S)
        page_tokens = cache.page_tokens
        starts_S = np.cumsum([0, *(len(chunk.tokens_N) for chunk in chunks)])
        slot_T = cache_places(chunks, positions, page_tokens)
        buckets = length_buckets([len(chunk.tokens_N) for chunk in chunks])
        groups = [
            self._group([(chunks[i], int(starts_S[i])) for i in bucket], page_tokens)
            for bucket in buckets
        ]
        return PagedAttention(cache, slot_T, groups)

    def _group(self, members: Sequence[tuple[Chunk, int]], page_tokens: int) -> PagedGroup:
        lengths_S = np.array([len(chunk.tokens_N) for chunk, _ in members])
        steps_L = np.arange(lengths_S.max())
        rows_S = np.array([row for _, row in members])
        real_SL = steps_L < lengths_S[:, None]
        query_SL = rows_S[:, None] + np.minimum(steps_L, lengths_S[:, None] - 1)
        starts_S = np.array([chunk.start for chunk, _ in members])
        pages_SP = page_table([chunk for chunk, _ in members], page_tokens)
        at_SL = starts_S[:, None] + np.minimum(steps_L, lengths_S[:, None] - 1)
        sight = Sight(at_SL, self._device)
        return PagedGroup(self._to(query_SL), self._to(real_SL), pages_SP, sight)

    def _draw(
        self, chunks: Sequence[Chunk], hidden_TD: Tensor, last_S: IntArray, slot_S: IntArray
    ) -> dict[int, tuple[int, float, TopLogprobs | None]]:
        """Next token, its log-probability and alternatives, for the chunks that draw one."""
        drawing = [i for i, chunk in enumerate(chunks) if chunk.draw is not None]
        if not drawing:
            return {}
        logits_RV = self._logits(hidden_TD[self._to(last_S[drawing])], slot_S[drawing])
        draws = [draw for chunk in chunks if (draw := chunk.draw) is not None]
        norms_R = logprobs.norms(logits_RV)
        tokens_R = choose_tokens(logits_RV, draws)
        chosen_R = _logprobs_of(logits_RV, norms_R, tokens_R[:, None])[:, 0]
        width = max(draw.num_top_logprobs for draw in draws)
        tops = _top(logits_RV, norms_R, width) if width else None
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
            logits_RV = self._logits(hidden_ND[rows], slot_R)
            norms_R = logprobs.norms(logits_RV)
            own_R = _logprobs_of(logits_RV, norms_R, scores.next_tokens_N[rows, None])[:, 0]
            top = _top(logits_RV, norms_R, scores.num_top) if scores.num_top else None
            candidates = None
            if scores.candidates_NK is not None:
                wanted_RK = scores.candidates_NK[rows]
                found_RK = _logprobs_of(logits_RV, norms_R, np.maximum(wanted_RK, 0))
                candidates = np.where(wanted_RK < 0, np.float32(np.nan), found_RK)
            place = chunk.start + scores.first_row + rows.start
            drawn = draw_alternatives(logits_RV, norms_R, scores.alternatives, place)
            parts.append(PromptScored(own_R, top, candidates, drawn))
        return join_scores(parts)

    def _logits(self, hidden_RD: Tensor, slot_R: IntArray) -> Tensor:
        head = self._model.head
        room_RV = self._room.rows(len(hidden_RD))
        return head.serve(hidden_RD, self._adapters(slot_R), self._together, room_RV)

    def _to(self, array: AnyArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def cache_places(
    chunks: Sequence[Chunk], positions: Sequence[IntArray], page_tokens: int
) -> IntArray:
    """Where each token's keys and values are, `page * page_tokens + offset`."""
    pairs = zip(chunks, positions, strict=True)
    return np.concatenate([places_in(chunk.pages, at_N, page_tokens) for chunk, at_N in pairs])


def places_in(pages: Sequence[int], at_N: IntArray, page_tokens: int) -> IntArray:
    """The same for some positions of one sequence."""
    found: IntArray = np.asarray(pages)[at_N // page_tokens] * page_tokens + at_N % page_tokens
    return found


def page_table(chunks: Sequence[Chunk], page_tokens: int) -> IntArray:
    """The pages that the chunks' tokens see, `[S, P]`; shorter rows end in page 0, out of sight."""
    longest = max(chunk.start + len(chunk.tokens_N) for chunk in chunks)
    pages_SP = np.zeros((len(chunks), -(-longest // page_tokens)), dtype=np.int64)
    for row_P, chunk in zip(pages_SP, chunks, strict=True):
        used = chunk.pages[: len(row_P)]
        row_P[: len(used)] = used
    return pages_SP


def draw_alternatives(
    logits_RV: Tensor, norms_R: FloatArray, alternatives: Sequence[Draw], place: int
) -> TopLogprobs | None:
    """One token per row and wanted draw; row 0 stands at `place` in the prompt."""
    if not alternatives:
        return None
    columns = []
    for wanted in alternatives:
        rows = range(len(logits_RV))
        draws = [replace(wanted, position=wanted.position + place + row) for row in rows]
        columns.append(choose_tokens(logits_RV, draws))
    tokens_RK = np.stack(columns, axis=1)
    return TopLogprobs(tokens_RK, _logprobs_of(logits_RV, norms_R, tokens_RK))


def choose_tokens(logits_RV: Tensor, draws: Sequence[Draw]) -> IntArray:
    """The token that each row's settings draw.

    The row's uniform number depends on its seed and position alone, so a sequence draws the same
    tokens whatever it is batched with.
    """
    heat_R = np.array([draw.temperature for draw in draws], np.float32)
    uniform_R = np.array([uniform_at(draw.seed, draw.position) for draw in draws], np.float32)
    tokens_R = logprobs.draw(logits_RV, heat_R, uniform_R)
    for row, draw in enumerate(draws):
        if draw.temperature > 0.0 and (draw.top_k > 0 or draw.top_p < 1.0):
            warm_V = logits_RV[row].float() / draw.temperature
            few_1V = truncate(warm_V, draw.top_k, draw.top_p)[None]
            this = slice(row, row + 1)
            tokens_R[this] = logprobs.draw(few_1V, np.ones(1, np.float32), uniform_R[this])
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


def _logprobs_of(logits_RV: Tensor, norms_R: FloatArray, tokens_RK: IntArray) -> FloatArray:
    tokens = torch.from_numpy(tokens_RK).to(logits_RV.device)
    found: FloatArray = logits_RV.gather(1, tokens).float().cpu().numpy()
    return found - norms_R[:, None]


def _top(logits_RV: Tensor, norms_R: FloatArray, k: int) -> TopLogprobs:
    best = logits_RV.topk(k, dim=-1)
    values_RK: FloatArray = best.values.float().cpu().numpy()
    return TopLogprobs(best.indices.cpu().numpy(), values_RK - norms_R[:, None])


def _narrow(top: TopLogprobs, rows: slice, k: int) -> TopLogprobs:
    return TopLogprobs(top.token_ids_NK[rows, :k], top.logprobs_NK[rows, :k])
