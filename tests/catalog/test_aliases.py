"""Aliases: examples, threads, and a state machine against a model in plain Python."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from openmint.catalog.catalog import Catalog
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.types import Digest
from tests.catalog.conftest import NewUrl
from tests.catalog.made import ANN, BASE, BOB, RUN, add_run, blob, digest_of

WORDS = st.integers(0, 5)
ALIASES = st.sampled_from(["prod", "canary"])


@pytest.fixture
def trained(catalog: Catalog) -> Catalog:
    """Policy `math` with revisions 1, 2 and 3."""
    add_run(catalog)
    for i in (1, 2, 3):
        catalog.add_run_revision(ANN, RUN, blob(i), ephemeral=False)
    return catalog


def promote(catalog: Catalog, word: int, version: int | None = None) -> int:
    moved = catalog.promote(
        ANN, "math", "prod", digest_of(word), actor="ann", expected_version=version
    )
    return moved.version


def test_a_policy_serves_prod_before_latest(trained: Catalog) -> None:
    with pytest.raises(NotFound, match="latest"):
        trained.resolve(ANN, "ann/math")
    trained.set_alias(ANN, "math", "latest", digest_of(2), actor="ann")
    assert trained.resolve(ANN, "ann/math").alias == "latest"
    promote(trained, 1)
    resolved = trained.resolve(ANN, "ann/math")
    assert (resolved.alias, resolved.revision.digest) == ("prod", digest_of(1))
    assert trained.resolve(ANN, "ann/math@latest").revision.digest == digest_of(2)
    exact = trained.resolve(ANN, f"ann/math@{digest_of(3)[:19]}")
    assert (exact.alias, exact.revision.digest) == (None, digest_of(3))


def test_an_address_of_another_tenant_is_not_found(trained: Catalog) -> None:
    promote(trained, 1)
    for tenant, address in ((BOB, "ann/math"), (BOB, "bob/math"), (ANN, "ann/math@canary")):
        with pytest.raises(NotFound):
            trained.resolve(tenant, address)
    with pytest.raises(InvalidRequest):
        trained.resolve(ANN, "math")


def test_a_move_leaves_event_and_audit(trained: Catalog) -> None:
    promote(trained, 1)
    trained.promote(ANN, "math", "prod", digest_of(2), actor="ann", reason="better")
    newest, oldest = trained.alias_history(ANN, "math", "prod")
    assert (newest.from_digest, newest.to_digest, newest.reason) == (
        digest_of(1),
        digest_of(2),
        "better",
    )
    assert (oldest.from_digest, oldest.action, oldest.actor) == (None, "promote", "ann")
    assert trained.alias_history(ANN, "math", before_id=newest.event_id) == [oldest]
    event = trained.audit(ANN)[0]
    assert (event.action, event.subject) == ("alias.promote", "ann/math@prod")
    assert event.details == {"from": digest_of(1), "to": digest_of(2), "reason": "better"}


def test_moving_an_alias_to_where_it_is_changes_nothing(trained: Catalog) -> None:
    assert promote(trained, 1) == promote(trained, 1) == 1
    assert len(trained.alias_history(ANN, "math")) == 1


def test_a_move_expects_the_version_that_was_read(trained: Catalog) -> None:
    assert promote(trained, 1, version=0) == 1
    assert promote(trained, 2, version=1) == 2
    for stale in (0, 1):
        with pytest.raises(Conflict, match="version 2"):
            promote(trained, 3, version=stale)
    assert trained.alias(ANN, "math", "prod").digest == digest_of(2)
    moves = [event for event in trained.audit(ANN) if event.action.startswith("alias.")]
    assert len(moves) == 2


def test_rolling_back_twice_goes_further_back(trained: Catalog) -> None:
    for word in (1, 2, 3):
        promote(trained, word)
    assert trained.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(2)
    assert trained.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(1)
    with pytest.raises(Conflict, match="nothing before"):
        trained.rollback(ANN, "math", "prod", actor="ann")
    assert [event.action for event in trained.alias_history(ANN, "math", limit=2)] == [
        "rollback",
        "rollback",
    ]


def test_a_rollback_skips_what_was_deleted(trained: Catalog) -> None:
    for word in (1, 2, 3):
        promote(trained, word)
    trained.delete_revision(ANN, "math", digest_of(2), actor="ann")
    assert trained.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(1)


def test_a_rollback_to_a_named_revision(trained: Catalog) -> None:
    for word in (1, 2, 3):
        promote(trained, word)
    moved = trained.rollback(ANN, "math", "prod", to_digest=digest_of(1)[:19], actor="ann")
    assert moved.digest == digest_of(1)
    with pytest.raises(NotFound):
        trained.rollback(ANN, "math", "canary", actor="ann")


def test_only_living_revisions_of_the_policy_are_promoted(trained: Catalog) -> None:
    trained.import_revision(ANN, "other", BASE, blob(9), actor="ann")
    trained.delete_revision(ANN, "math", digest_of(3), actor="ann")
    for word in (9, 3, 77):
        with pytest.raises(NotFound):
            promote(trained, word)
    assert trained.aliases(ANN, "math") == []


def test_of_concurrent_promotes_from_one_version_one_wins(trained: Catalog) -> None:
    def attempt(i: int) -> bool:
        try:
            promote(trained, 1 + i % 3, version=0)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = sum(pool.map(attempt, range(24)))
    assert won == 1
    assert trained.alias(ANN, "math", "prod").version == 1


def test_concurrent_promotes_make_one_chain_of_events(trained: Catalog) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: promote(trained, 1 + i % 3), range(40)))
    events = trained.alias_history(ANN, "math", "prod")[::-1]
    came_from = [event.from_digest for event in events]
    assert came_from == [None, *(event.to_digest for event in events[:-1])]
    assert trained.alias(ANN, "math", "prod").version == len(events)
    assert len([e for e in trained.audit(ANN) if e.action == "alias.promote"]) == len(events)


class AliasMachine(RuleBasedStateMachine):
    """Creates, promotes, rolls back, deletes and reopens; a dict of stacks says what is right."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    @initialize()
    def open(self) -> None:
        self.catalog = Catalog.open(self.url)
        add_run(self.catalog)
        self.live: set[Digest] = set()
        self.numbers: dict[Digest, int] = {}
        self.stacks: dict[str, list[Digest]] = {}
        self.versions: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            self.catalog.close()

    @rule(word=WORDS)
    def create(self, word: int) -> None:
        digest = digest_of(word)
        made = self.catalog.add_run_revision(ANN, RUN, blob(word), ephemeral=False)
        assert made.number == self.numbers.setdefault(digest, len(self.numbers) + 1)
        self.live.add(digest)

    @rule(word=WORDS, alias=ALIASES, stale=st.booleans())
    def promote(self, word: int, alias: str, stale: bool) -> None:
        digest, version = digest_of(word), self.versions.get(alias, 0)

        def move() -> None:
            expected = version + stale
            self.catalog.promote(ANN, "math", alias, digest, actor="ann", expected_version=expected)

        if digest not in self.live:
            with pytest.raises(NotFound):
                move()
        elif stale:
            with pytest.raises(Conflict):
                move()
        else:
            move()
            stack = self.stacks.setdefault(alias, [])
            if not stack or stack[-1] != digest:
                stack.append(digest)
                self.versions[alias] = version + 1

    @rule(alias=ALIASES)
    def roll_back(self, alias: str) -> None:
        stack = self.stacks.get(alias)
        if stack is None:
            with pytest.raises(NotFound):
                self.catalog.rollback(ANN, "math", alias, actor="ann")
            return
        below = [
            i for i, digest in enumerate(stack[:-1]) if digest in self.live and digest != stack[-1]
        ]
        if not below:
            with pytest.raises(Conflict):
                self.catalog.rollback(ANN, "math", alias, actor="ann")
            return
        self.catalog.rollback(ANN, "math", alias, actor="ann")
        del stack[below[-1] + 1 :]
        self.versions[alias] += 1

    @rule(word=WORDS)
    def delete(self, word: int) -> None:
        digest = digest_of(word)
        if digest not in self.live:
            with pytest.raises(NotFound):
                self.catalog.delete_revision(ANN, "math", digest, actor="ann")
        elif any(stack[-1] == digest for stack in self.stacks.values()):
            with pytest.raises(Conflict):
                self.catalog.delete_revision(ANN, "math", digest, actor="ann")
        else:
            self.catalog.delete_revision(ANN, "math", digest, actor="ann")
            self.live.remove(digest)

    @rule()
    def reopen(self) -> None:
        self.catalog.close()
        self.catalog = Catalog.open(self.url)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "catalog"):
            return
        found = {a.name: (a.digest, a.version) for a in self.catalog.aliases(ANN, "math")}
        assert found == {
            name: (stack[-1], self.versions[name]) for name, stack in self.stacks.items()
        }
        assert {r.digest for r in self.catalog.revisions(ANN, "math")} == self.live
        assert not self.live & set(self.catalog.unused_blobs())
        for name, stack in self.stacks.items():
            assert self.catalog.resolve(ANN, f"ann/math@{name}").revision.digest == stack[-1]
            events = self.catalog.alias_history(ANN, "math", name)
            assert len(events) == self.versions[name]


def test_aliases_agree_with_the_model(new_url: NewUrl) -> None:
    run_state_machine_as_test(
        lambda: AliasMachine(new_url()),
        settings=settings(max_examples=25, stateful_step_count=30, deadline=None),
    )
