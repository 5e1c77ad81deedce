"""Pins at work: what workers are told to hold, how much that may be, and what is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Quota
from openmint.config import ServiceConfig, Settings, WorkerConfig
from openmint.errors import Conflict, InvalidRequest, LimitReached, NotFound
from openmint.service.limits import Limits
from openmint.service.pinning import Pinning
from openmint.service.prewarming import Prewarming
from openmint.service.promotion import Promotion
from openmint.service.workers import Workers
from openmint.types import BaseInfo, Digest, LoraSpec, TargetModule, Tenant, stacks_of
from tests.catalog.made import ANN, BASE, BOB, base_named, digest_of

pytestmark = pytest.mark.anyio

NUM_BYTES = 8 * (4 + 6) * 2
"""Of a revision of rank 8 in bf16."""
TARGET = TargetModule("model.layers.0.self_attn.q_proj", "attn", 4, 6)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def resident(base: BaseInfo) -> BaseInfo:
    return replace(base, stacks=stacks_of([TARGET]), num_params=3, weight_bytes=6)


@dataclass(eq=False)
class Worker:
    """A worker that has in memory what the test says."""

    replica: int = 0
    base: BaseInfo = field(default_factory=lambda: resident(BASE))
    held: tuple[Digest, ...] = ()
    there: set[Digest] = field(default_factory=set)

    def hold(self, revisions: tuple[Digest, ...]) -> None:
        self.held = revisions

    def is_resident(self, revision: Digest) -> bool:
        return revision in self.there


class Place:
    """A gateway's pins over two workers; in their memory five revisions of rank 8 have room, pins
    may take three, those of a tenant two."""

    def __init__(self, catalog: Catalog, quota: Quota | None = None) -> None:
        self.catalog = catalog
        self.all = [Worker(), Worker(1)]
        self.workers = Workers(1)
        for worker in self.all:
            self.workers.add(worker)  # type: ignore[arg-type]
        limits = Limits(catalog, quota or Quota())
        settings = Settings(
            worker=WorkerConfig(host_bytes=5 * NUM_BYTES),
            service=ServiceConfig(pin_share=0.6, tenant_pin_share=0.4),
        )
        self.pinning = Pinning(catalog, self.workers, limits, settings)
        limits.count_resident_by(lambda tenant: (0, self.pinning.revisions(tenant)))

    def held(self) -> list[Digest]:
        """What both workers were told to hold."""
        assert self.all[0].held == self.all[1].held
        return list(self.all[0].held)

    async def pin(self, policy: str, tenant: Tenant = ANN) -> Any:
        return await self.pinning.pin(tenant, policy, "latest", actor="x")

    async def states(self, tenant: Tenant = ANN) -> list[list[str]]:
        found = await self.pinning.statuses(tenant)
        return [[state for state, _ in status.states] for status in found]


def save(
    catalog: Catalog, word: str, policy: str = "", tenant: Tenant = ANN, rank: int = 8
) -> Digest:
    """A new revision of a policy, which its `latest` names."""

    class Saved:
        digest, size_bytes, spec, num_optim_steps = digest_of(word), 1, LoraSpec(rank), 1

    policy = policy or word
    return catalog.import_revision(tenant, policy, BASE, Saved(), actor="x").digest


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """Policies `a` to `d` with a revision each."""
    catalog = Catalog.open(f"sqlite:///{tmp_path / 'openmint.db'}")
    for word in "abcd":
        save(catalog, word)
    yield catalog
    catalog.close()


async def test_every_worker_of_the_base_holds_it_and_the_list_says_since_when(
    catalog: Catalog,
) -> None:
    place = Place(catalog)
    status = await place.pin("a")
    assert place.held() == [digest_of("a")]
    assert status.states == (("loading", NUM_BYTES),)
    place.all[0].there.add(digest_of("a"))
    assert await place.states() == [["loading"]]
    place.all[1].there.add(digest_of("a"))
    assert await place.states() == [["held"]]
    assert await place.states(BOB) == []
    await place.pinning.unpin(ANN, "a", "latest", actor="x")
    assert (place.held(), await place.states()) == ([], [])


class NoTargets:
    """Where no model is found to be prewarmed."""

    def resolve(self, tenant: Tenant, model: str) -> Any:
        raise NotFound(model)


async def test_pins_follow_every_change_of_their_alias(catalog: Catalog) -> None:
    place = Place(catalog)
    prewarming = Prewarming(NoTargets(), place.pinning)  # type: ignore[arg-type]
    promotion = Promotion(catalog, prewarming)
    catalog.promote(ANN, "a", "prod", digest_of("a"), actor="x")
    save(catalog, "a2", "a")
    first, second = digest_of("a"), digest_of("a2")
    await place.pinning.pin(ANN, "a", "prod", actor="x")
    where: dict[str, Any] = {"tenant": ANN, "policy": "a", "alias": "prod", "actor": "x"}
    where |= {"reason": "", "expected_version": None}
    for change, more, held in (
        (promotion.promote, {"reference": second, "override_reason": None}, [second]),
        (promotion.rollback, {}, [first]),
        (promotion.set_canary, {"reference": second, "share": 0.5}, [first, second]),
        (promotion.abort_canary, {}, [first]),
        (promotion.set_canary, {"reference": second, "share": 0.5}, [first, second]),
        (promotion.finish_canary, {"override_reason": None}, [second]),
    ):
        await change(**where, **more)  # type: ignore[operator]
        await asyncio.gather(*place.pinning._background._tasks)
        assert place.held() == held


async def test_another_gateway_holds_what_was_pinned(catalog: Catalog) -> None:
    await Place(catalog).pin("a")
    again = Place(catalog)
    assert again.held() == []
    await again.pinning.apply()
    assert again.held() == [digest_of("a")]


async def test_a_tenant_pins_no_more_than_its_share_and_all_no_more_than_theirs(
    catalog: Catalog,
) -> None:
    place = Place(catalog)
    await place.pin("a")
    await place.pin("b")
    with pytest.raises(Conflict) as refused:
        await place.pin("c")
    for told in ("tenant 'ann'", "tenant_pin_share", f"{2 * NUM_BYTES} bytes", "Unpin an alias"):
        assert told in refused.value.message
    await place.pin("b")  # a retry
    for word in ("e", "f"):
        save(catalog, word, tenant=BOB)
    await place.pin("e", BOB)
    with pytest.raises(Conflict, match=rf"^pins may .*service\.pin_share.* {3 * NUM_BYTES}; "):
        await place.pin("f", BOB)
    assert place.held() == [digest_of(word) for word in "abe"]
    assert len(catalog.pins()) == 3


async def test_one_revision_under_several_pins_takes_its_room_once(catalog: Catalog) -> None:
    place = Place(catalog)
    for policy in ("p", "q", "r"):
        save(catalog, "same", policy)
        await place.pin(policy)
    assert place.held() == [digest_of("same")]
    await place.pinning.unpin(ANN, "p", "latest", actor="x")
    assert place.held() == [digest_of("same")]


async def test_a_move_to_more_than_has_room_leaves_out_the_newest_pin(catalog: Catalog) -> None:
    place = Place(catalog)
    await place.pin("a")
    await place.pin("b")
    save(catalog, "wide", "a", rank=16)
    await place.pinning.apply()
    assert place.held() == [digest_of("wide")]
    assert await place.states() == [["loading"], ["over_limit"]]
    save(catalog, "wider than all", "a", rank=64)
    await place.pinning.apply()
    assert place.held() == [digest_of("b")]
    assert await place.states() == [["over_limit"], ["loading"]]
    await place.pinning.unpin(ANN, "a", "latest", actor="x")
    assert await place.states() == [["loading"]]


async def test_pinned_revisions_count_as_resident_adapters(catalog: Catalog) -> None:
    place = Place(catalog, Quota(resident_adapters=1))
    await place.pin("a")
    with pytest.raises(LimitReached, match="2 sampled or pinned revisions"):
        await place.pin("b")
    with pytest.raises(LimitReached):
        place.pinning._limits.check_sample(ANN, digest_of("b"))
    place.pinning._limits.check_sample(ANN, digest_of("a"))


async def test_what_no_worker_can_hold_is_not_pinned(catalog: Catalog) -> None:
    place = Place(catalog)
    place.all[:] = [Worker(base=resident(base_named("other")))]
    place.workers = Workers(1)
    place.workers.add(place.all[0])  # type: ignore[arg-type]
    place.pinning._workers = place.workers
    with pytest.raises(NotFound, match="no resident base"):
        await place.pin("a")
    assert catalog.pins() == []
    catalog.add_pin(ANN, "a", "latest", actor="x")
    await place.pinning.apply()
    assert (place.all[0].held, await place.states()) == ((), [["no_worker"]])
    with pytest.raises(NotFound, match="no alias"):
        await place.pinning.pin(ANN, "a", "nobody", actor="x")


@pytest.mark.parametrize("setting", ["pin_share", "tenant_pin_share"])
def test_shares_leave_room_for_others(setting: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"service\.{setting} must be 0 to 0.9"):
        ServiceConfig(**{setting: 0.95})
