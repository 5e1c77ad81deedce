"""Which revision is asked for next? Traces of uses, each a way in which services are used.

All are seeded. Ranks, and so sizes, are mixed as customers mix them: most adapters are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from openmint.residency.replay import Use
from openmint.types import Digest

NUM_REVISIONS = 2_000
NUM_USES = 60_000
RANKS, SHARES = (1, 4, 8, 16, 32, 64), (0.2, 0.2, 0.25, 0.2, 0.1, 0.05)
BYTES_PER_RANK = 610_560
"""SmolLM2-135M, all targets but the head, bf16."""


def size_of(index: int) -> int:
    """Bytes of a revision, by its number alone."""
    rank = np.random.default_rng(index).choice(RANKS, p=SHARES)
    return int(rank) * BYTES_PER_RANK


SIZES = [size_of(index) for index in range(NUM_REVISIONS)]


def uses_of(indices: Sequence[int]) -> list[Use]:
    return [Use(Digest(f"sha256:{index:064x}"), SIZES[index % NUM_REVISIONS]) for index in indices]


def uniform(seed: int) -> list[Use]:
    """Everybody is asked for as often as everybody else."""
    return uses_of(np.random.default_rng(seed).integers(0, NUM_REVISIONS, NUM_USES).tolist())


def zipf(exponent: float) -> Callable[[int], list[Use]]:
    """Steady favourites: the k-th is asked for k^-exponent as often as the first."""

    def trace(seed: int) -> list[Use]:
        numbers = np.random.default_rng(seed)
        return uses_of(numbers.permutation(NUM_REVISIONS)[_ranks(numbers, exponent)].tolist())

    return trace


def drift(seed: int) -> list[Use]:
    """Favourites that change: every 40 uses each place goes to the next revision."""
    numbers = np.random.default_rng(seed)
    names = numbers.permutation(NUM_REVISIONS)
    steps = np.arange(NUM_USES) // 40
    return uses_of(names[(_ranks(numbers, 1.0) + steps) % NUM_REVISIONS].tolist())


def rollout_wave(seed: int) -> list[Use]:
    """Eight policies in training: each step's new revision is sampled 64 times, then never again.
    Half of all uses are others', by favourites."""
    numbers = np.random.default_rng(seed)
    others = numbers.permutation(NUM_REVISIONS)[_ranks(numbers, 1.0)]
    indices, fresh, left = [], np.arange(8), np.full(8, 64)
    newest = NUM_REVISIONS + 8
    fresh += NUM_REVISIONS
    for other in others:
        if numbers.random() < 0.5:
            indices.append(int(other))
            continue
        policy = int(numbers.integers(8))
        indices.append(int(fresh[policy]))
        left[policy] -= 1
        if not left[policy]:
            fresh[policy], left[policy] = newest, 64
            newest += 1
    return uses_of(indices)


def deploy_spike(seed: int) -> list[Use]:
    """Favourites; every 3,000 uses 20 aliases move to new revisions, which take a third of all uses
    for a while and their favourites' places after it."""
    numbers = np.random.default_rng(seed)
    names = numbers.permutation(NUM_REVISIONS)
    ranks = _ranks(numbers, 1.0)
    indices, newest = [], NUM_REVISIONS
    moved = np.empty(0, np.int64)
    for at, rank in enumerate(ranks):
        if at % 3_000 == 1_500:
            moved = numbers.choice(200, 20, replace=False)
            names[moved] = np.arange(newest, newest + 20)
            newest += 20
        is_spike = at % 3_000 >= 1_500 and at % 3_000 < 2_500 and numbers.random() < 1 / 3
        indices.append(int(names[numbers.choice(moved) if is_spike else rank]))
    return uses_of(indices)


TRACES: dict[str, Callable[[int], list[Use]]] = {
    "uniform": uniform,
    "Zipf 0.8": zipf(0.8),
    "Zipf 1.0": zipf(1.0),
    "Zipf 1.2": zipf(1.2),
    "drifting hot set": drift,
    "rollout wave": rollout_wave,
    "post-deploy spike": deploy_spike,
}


def _ranks(numbers: np.random.Generator, exponent: float) -> np.ndarray[tuple[int], np.dtype]:
    weights = np.arange(1, NUM_REVISIONS + 1) ** -exponent
    return numbers.choice(NUM_REVISIONS, NUM_USES, p=weights / weights.sum())
