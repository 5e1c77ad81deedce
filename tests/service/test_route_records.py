"""Records of routes are found by the tokens that they belong to, and by nobody else."""

from __future__ import annotations

import numpy as np
import pytest

from openmint.config import ServiceConfig
from openmint.errors import InvalidRequest
from openmint.scheduler.work import SampleResult, SampleWork
from openmint.service.replaying import Replaying
from openmint.service.route_records import RouteRecords
from openmint.types import (
    Datum,
    Digest,
    IntArray,
    LossSpec,
    SampledSequence,
    SamplingParams,
    Tenant,
)

BASE, OTHER_BASE = Digest("sha256:1"), Digest("sha256:2")
ACME, GLOBEX = Tenant("acme"), Tenant("globex")
PROMPT = np.arange(40)
LOSS = LossSpec("ppo")


def keep(
    records: RouteRecords, completion: list[int], record: bytes, tenant: Tenant = ACME
) -> IntArray:
    """The tokens that were computed: all but the last one."""
    tokens_N = np.array(completion)
    sequence = SampledSequence(
        tokens_N, np.zeros(len(completion), np.float32), "length", None, record
    )
    work = SampleWork(tenant, None, PROMPT, SamplingParams(8), routes=True)
    records.sampled(BASE, work, SampleResult((sequence,), None, BASE))
    return np.concatenate([PROMPT, tokens_N])[:-1]


@pytest.fixture
def records() -> RouteRecords:
    return RouteRecords(1 << 20)


def test_the_same_tokens_find_their_record(records: RouteRecords) -> None:
    made = [keep(records, [n, 7, 7], bytes([n])) for n in range(50)]
    for n, tokens_N in enumerate(made):
        found = records.find(ACME, BASE, tokens_N)
        assert found is not None
        assert (found.record, found.num_tokens) == (bytes([n]), 42)


def test_the_record_with_most_tokens_in_common_is_found(records: RouteRecords) -> None:
    """Of a datum that was cut, one that goes on, and one whose end was replaced."""
    long = [*range(100, 130)]
    keep(records, [5] * 30, b"other")
    keep(records, long, b"mine")
    for completion, length in ((long[:20], 60), ([*long, 1, 2, 3], 69), ([*long[:25], 9], 65)):
        found = records.find(ACME, BASE, np.concatenate([PROMPT, completion]))
        assert found is not None
        assert (found.record, found.num_tokens) == (b"mine", length)


def test_the_newest_of_equals_is_found(records: RouteRecords) -> None:
    keep(records, [1, 2], b"old")
    tokens_N = keep(records, [1, 2], b"new")
    found = records.find(ACME, BASE, tokens_N)
    assert found is not None
    assert found.record == b"new"


def test_another_tenants_or_bases_records_are_not_found(records: RouteRecords) -> None:
    tokens_N = keep(records, [1, 2], b"mine")
    assert records.find(GLOBEX, BASE, tokens_N) is None
    assert records.find(ACME, OTHER_BASE, tokens_N) is None
    assert records.find(ACME, BASE, tokens_N + 1) is None


def test_memory_is_bounded_and_who_was_asked_for_last_stays() -> None:
    records = RouteRecords(40_000)
    first = keep(records, [1, 1], b"x" * 1000)
    for n in range(2, 200):
        keep(records, [n, n], b"x" * 1000)
        assert records.find(ACME, BASE, first) is not None
        assert records.used_bytes <= 40_000
    assert 10 < len(records) < 40
    assert records.find(ACME, BASE, np.concatenate([PROMPT, [2]])) != records.find(
        ACME, BASE, first
    )
    everything = records.used_bytes
    keep(records, [9, 9], b"x" * 100_000)
    assert records.used_bytes == everything, "what is larger than the limit is not kept"


def datum(tokens_N: IntArray, first_advantage: int) -> Datum:
    count_N = np.arange(len(tokens_N))
    advantages = (count_N >= first_advantage).astype(np.float32)
    return Datum(tokens_N, {"target_tokens": tokens_N, "advantages": advantages})


@pytest.mark.parametrize(("how", "is_forced"), [("mask", True), ("measure", False)])
def test_data_of_policy_losses_get_their_routes(
    records: RouteRecords, how: str, is_forced: bool
) -> None:
    tokens_N = keep(records, [1, 2, 3], b"mine")
    replaying = Replaying(ServiceConfig(replay=how), records)
    (routed,) = replaying.routed(ACME, BASE, (datum(tokens_N, 39),), LOSS)
    assert routed.routes is not None
    assert (routed.routes.num_tokens, routed.routes.is_forced) == (42, is_forced)


def test_a_prompt_in_common_makes_no_sequence_ours(records: RouteRecords) -> None:
    keep(records, [1, 2, 3], b"mine")
    foreign = np.concatenate([PROMPT, [8, 9]])
    replaying = Replaying(ServiceConfig(), records)
    (routed,) = replaying.routed(ACME, BASE, (datum(foreign, 40),), LOSS)
    assert routed.routes is None


def test_other_losses_and_the_switch_leave_data_alone(records: RouteRecords) -> None:
    tokens_N = keep(records, [1, 2, 3], b"mine")
    given = (datum(tokens_N, 39),)
    assert Replaying(ServiceConfig(replay="off"), records).routed(ACME, BASE, given, LOSS) == given
    plain = (Datum(tokens_N, {"target_tokens": tokens_N}),)
    spec = LossSpec("cross_entropy")
    assert Replaying(ServiceConfig(), records).routed(ACME, BASE, plain, spec) == plain
    with pytest.raises(InvalidRequest, match="replay"):
        ServiceConfig(replay="sometimes")
