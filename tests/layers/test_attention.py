"""Packed and paged attention against one plain masked softmax per sequence."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openmint.engine.plan import Chunk
from openmint.engine.sample_step import SampleLane
from openmint.kernels.tile import IS_AVAILABLE
from openmint.layers import attention
from openmint.layers.attention import (
    MAX_PADDING,
    NO_WINDOW,
    Heads,
    KVCache,
    PackedAttention,
    length_buckets,
)

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 8, 4
CPU = torch.device("cpu")
WINDOWS = [None, 1, 5]


def heads_of(layer: int, window: int | None, width: int = DIM) -> Heads:
    return Heads(layer, width**-0.5, NO_WINDOW if window is None else window)


def ragged(seed: int) -> list[int]:
    numbers = np.random.default_rng(seed)
    return [int(n) for n in numbers.integers(1, 30, numbers.integers(1, 12))]


def random_qkv(num_tokens: int, seed: int, width: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, width) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence: every query over the keys up to its own, at most `window` of them."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    at = torch.arange(len(q))
    distance = at[:, None] - at[None, :]
    sees = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def plain_packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None) -> Tensor:
    parts = [x.split(lengths) for x in (q, k, v)]
    return torch.cat([plain(*sequence, window) for sequence in zip(*parts, strict=True)])


@pytest.fixture(params=["plain GEMMs", "fused kernel"], autouse=True)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fused kernel":
        monkeypatch.setattr(attention, "PLAIN_TOKENS", 0)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(8))
def test_packed_attention_is_each_sequences_own(seed: int, window: int | None) -> None:
    lengths = ragged(seed)
    inputs = random_qkv(sum(lengths), seed)
    grad_out = random_qkv(sum(lengths), seed + 1)[0].flatten(1)
    results = []
    for attend in (
        lambda q, k, v: PackedAttention(lengths, CPU).attend(heads_of(0, window), q, k, v),
        lambda q, k, v: plain_packed(q, k, v, lengths, window),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    for ours, theirs in zip(*results, strict=True):
        # In float32, as the kernels compute; a gradient that is zero by algebra is 2e-6 by sums.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("width", [16, 64, 80])
def test_tiled_attention_is_each_sequences_own(width: int, window: int | None) -> None:
    lengths = [*ragged(0), 70]
    inputs = [x.bfloat16() for x in random_qkv(sum(lengths), 0, width)]
    grad_out = random_qkv(sum(lengths), 1, width)[0].flatten(1).bfloat16()
    leaves = [x.clone().requires_grad_() for x in inputs]
    heads = heads_of(0, window, width)
    out = PackedAttention(lengths, CPU).attend(heads, leaves[0], leaves[1], leaves[2])
    results = [out, *torch.autograd.grad(out, leaves, grad_out)]
    wide = [x.float().requires_grad_() for x in inputs]
    expected = plain_packed(wide[0], wide[1], wide[2], lengths, window)
    theirs = [expected, *torch.autograd.grad(expected, wide, grad_out.float())]
    for ours, their in zip(results, theirs, strict=True):
        gap, size = (ours.detach().float() - their.detach()).norm(), their.detach().norm()
        assert float(gap) <= 1e-2 * float(size) + 0.05


def paged_sampler(num_pages: int) -> SampleLane:
    """A sampler over a model of which attention sees only where it is."""
    model: Any = SimpleNamespace(head=torch.zeros(1))
    cache = KVCache(2, num_pages, PAGE, KV_HEADS, (DIM, DIM), torch.float32, CPU)
    # What an earlier owner left in a page must never be seen.
    cache.keys.fill_(1e3)
    cache.values.fill_(1e6)
    return SampleLane(model, cache, None)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(8))
def test_paged_attention_is_the_same_however_the_tokens_are_cut(
    seed: int, window: int | None
) -> None:
    numbers = np.random.default_rng(100 + seed)
    lengths = ragged(seed)
    q, k, v = random_qkv(sum(lengths), seed)
    expected = plain_packed(q, k, v, lengths, window).split(lengths)
    starts = np.cumsum([0, *lengths])
    num_pages = [-(-length // PAGE) for length in lengths]
    shuffled = [int(p) for p in numbers.permutation(sum(num_pages) + 3)]
    pages = [[shuffled.pop() for _ in range(count)] for count in num_pages]
    sampler = paged_sampler(sum(num_pages) + 3)
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        going = [i for i, at in enumerate(done) if at < lengths[i] and numbers.random() < 0.7]
        if not going:
            continue
        stops = {i: int(numbers.integers(done[i] + 1, lengths[i] + 1)) for i in going}
        chunks = [
            Chunk(i, np.zeros(stops[i] - done[i], np.int64), done[i], tuple(pages[i]), None, None)
            for i in going
        ]
        positions = [np.arange(done[i], stops[i]) for i in going]
        rows = torch.cat([torch.arange(starts[i] + done[i], starts[i] + stops[i]) for i in going])
        paged = sampler._attention(chunks, positions, sampler._cache)
        out = paged.attend(heads_of(1, window), q[rows], k[rows], v[rows])
        for i, part in zip(going, out.split([stops[i] - done[i] for i in going]), strict=True):
            wanted = expected[i][done[i] : stops[i]]
            torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-6)
            done[i] = stops[i]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_an_overflow_leaves_in_a_page_reaches_nobody_else(poison: float) -> None:
    lengths = [5, 9]
    q, k, v = random_qkv(14, 0)
    expected = plain_packed(q, k, v, lengths, None)
    sampler = paged_sampler(6)
    every = Chunk(0, np.zeros(24, np.int64), 0, tuple(range(6)), None, None)
    bad = torch.full((24, KV_HEADS, DIM), poison)
    sampler._attention([every], [np.arange(24)], sampler._cache).attend(
        heads_of(0, None), torch.ones(24, HEADS, DIM), bad, bad
    )
    chunks = [
        Chunk(i, np.zeros(length, np.int64), 0, pages, None, None)
        for i, (length, pages) in enumerate(zip(lengths, ((1, 3), (2, 4, 5)), strict=True))
    ]
    at = [np.arange(length) for length in lengths]
    paged = sampler._attention(chunks, at, sampler._cache)
    torch.testing.assert_close(
        paged.attend(heads_of(0, None), q, k, v), expected, rtol=1e-5, atol=1e-5
    )


def test_buckets_hold_each_sequence_once_with_bounded_padding() -> None:
    for seed in range(200):
        lengths = ragged(seed)
        buckets = length_buckets(lengths)
        assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
        padded = sum(max(lengths[i] for i in bucket) * len(bucket) for bucket in buckets)
        assert padded <= MAX_PADDING * sum(lengths)
        tops = [lengths[bucket[0]] for bucket in buckets]
        assert tops == sorted(tops, reverse=True)


def test_equal_lengths_share_one_bucket() -> None:
    assert len(length_buckets([7] * 50)) == 1
    assert length_buckets([]) == []
