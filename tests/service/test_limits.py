"""A tenant's limits: what is refused, for how long, and that nobody else notices."""

import asyncio

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Quota
from openmint.errors import LimitReached
from openmint.service import limits as module
from openmint.service.limits import Limits
from openmint.types import Digest, Tenant
from tests.catalog.made import ANN, add_run, blob

BOB = Tenant("bob")
DIGEST = Digest("sha256:" + "a" * 64)


class Clock:
    """What the limits take for the time."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'c.db'}")
    yield catalog
    catalog.close()


def limits_of(catalog, **quota):
    limits = Limits(catalog, Quota())
    asyncio.run(limits.set_quota(ANN, Quota(**quota), actor="test"))
    return limits


def test_requests_are_counted_and_come_back_with_time(catalog, clock):
    limits = limits_of(catalog, requests_per_minute=6)
    for _ in range(6):
        limits.take_request(ANN)
    with pytest.raises(LimitReached, match="6 requests a minute") as caught:
        limits.take_request(ANN)
    assert caught.value.retry_after_seconds == pytest.approx(10.0)
    limits.take_request(BOB)
    clock.now += 10.0
    limits.take_request(ANN)
    with pytest.raises(LimitReached):
        limits.take_request(ANN)


def test_an_hour_of_rest_saves_no_more_than_a_minute(catalog, clock):
    limits = limits_of(catalog, requests_per_minute=6)
    limits.take_request(ANN)
    clock.now += 3600
    for _ in range(6):
        limits.take_request(ANN)
    with pytest.raises(LimitReached):
        limits.take_request(ANN)


def test_tokens_are_paid_back_after_they_were_used(catalog, clock):
    limits = limits_of(catalog, tokens_per_minute=60)
    limits.check_tokens(ANN)
    limits.charge_tokens(ANN, 90)
    with pytest.raises(LimitReached) as caught:
        limits.check_tokens(ANN)
    assert caught.value.retry_after_seconds == pytest.approx(30.0, abs=0.01)
    clock.now += 31
    limits.check_tokens(ANN)


def test_adapters_are_runs_and_sampled_revisions_together(catalog):
    limits = limits_of(catalog, resident_adapters=2)
    resident = {"runs": 1, "sampled": set()}
    limits.count_resident_by(lambda tenant: (resident["runs"], resident["sampled"]))
    limits.check_run(ANN)
    limits.check_sample(ANN, DIGEST)
    resident["sampled"] = {DIGEST}
    with pytest.raises(LimitReached, match="2 live training runs and 1 sampled"):
        limits.check_run(ANN)
    limits.check_sample(ANN, DIGEST)  # it is one of those
    limits.check_sample(ANN, None)  # the base is nobody's
    with pytest.raises(LimitReached):
        limits.check_sample(ANN, Digest("sha256:" + "b" * 64))
    limits.check_run(BOB)


def test_stored_bytes_are_those_of_distinct_checkpoints_and_revisions(catalog):
    run = add_run(catalog)
    saved = blob("1")
    catalog.add_checkpoint(ANN, run, "sampler_weights", "a", saved)
    catalog.add_checkpoint(ANN, run, "sampler_weights", "b", saved)
    assert catalog.stored_bytes(ANN) == saved.size_bytes
    limits = limits_of(catalog, stored_bytes=saved.size_bytes)
    with pytest.raises(LimitReached, match="delete checkpoints"):
        limits.check_stored(ANN)
    limits.check_stored(BOB)


def test_a_quota_outlives_the_process_and_can_be_cleared(catalog):
    limits_of(catalog, requests_per_minute=6)
    again = Limits(catalog, Quota(requests_per_minute=99))
    assert again.quota(ANN) == Quota(requests_per_minute=6)
    assert again.quota(BOB) == Quota(requests_per_minute=99)
    asyncio.run(again.set_quota(ANN, None, actor="test"))
    assert again.quota(ANN) == Quota(requests_per_minute=99)
    assert [event.action for event in catalog.audit(ANN)] == ["quota.set", "quota.set"]
