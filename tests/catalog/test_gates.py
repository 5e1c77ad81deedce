"""Gates: what holds an alias back, what lets it go, and what is told about it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Gate
from openmint.errors import Conflict, GateFailed, InvalidRequest, NotFound
from openmint.types import Digest
from tests.catalog.made import ANN, BOB, RUN, add_run, blob, digest_of

NUM_ITEMS = 40
BODY = {"items": [1] * NUM_ITEMS}


@pytest.fixture
def trained(catalog: Catalog) -> Catalog:
    """Policy `math` with revisions 1 to 3 and a task; `prod` names 1."""
    add_run(catalog)
    for i in (1, 2, 3):
        catalog.add_run_revision(ANN, RUN, blob(i), ephemeral=False)
    catalog.put_task(ANN, "sums", digest_of("sums"), BODY)
    promote(catalog, 1)
    return catalog


def promote(catalog: Catalog, word: int, override: str | None = None) -> Digest:
    return catalog.promote(
        ANN, "math", "prod", digest_of(word), actor="ann", override_reason=override
    ).digest


def add_gate(
    catalog: Catalog,
    task: str = "sums",
    *,
    alias: str = "prod",
    min_score: float | None = None,
    margin: float | None = None,
    num_items: int | None = None,
) -> Gate:
    return catalog.add_gate(
        ANN,
        "math",
        alias,
        task,
        min_score=min_score,
        margin=margin,
        confidence=0.95,
        num_items=num_items,
        actor="ann",
    )


def evaluate(
    catalog: Catalog,
    word: int,
    outcomes: Sequence[bool],
    task: Digest | None = None,
    temperature: float = 0.0,
) -> int:
    started = catalog.start_evaluation(
        ANN,
        policy_name="math",
        digest=digest_of(word),
        base_name="tiny",
        task_name="sums",
        task_digest=task or digest_of("sums"),
        num_items=len(outcomes),
        sampling={"temperature": temperature, "max_tokens": 8},
    ).evaluation_id
    return catalog.finish_evaluation(ANN, started, outcomes).evaluation_id


def right(num_right: int, num_items: int = NUM_ITEMS) -> list[bool]:
    return [i < num_right for i in range(num_items)]


def test_a_revision_below_the_score_is_held_back(trained: Catalog) -> None:
    gate = add_gate(trained, min_score=0.75)
    evaluation = evaluate(trained, 2, right(29))
    with pytest.raises(GateFailed, match=r"0\.725") as caught:
        promote(trained, 2)
    (failure,) = caught.value.failures
    assert (failure["gate_id"], failure["evaluation_id"]) == (gate.gate_id, evaluation)
    assert (failure["score"], failure["run"]) == (0.725, ())
    assert trained.alias(ANN, "math", "prod").digest == digest_of(1)
    evaluate(trained, 3, right(30))
    assert promote(trained, 3) == digest_of(3)


def test_a_missing_evaluation_says_what_to_run(trained: Catalog) -> None:
    add_gate(trained, min_score=0.5)
    command = f"openmint evaluate ann/math@{digest_of(2)} --task sums"
    with pytest.raises(GateFailed) as caught:
        promote(trained, 2)
    assert caught.value.failures[0]["run"] == (command,)
    assert command in caught.value.message
    add_gate(trained, digest_of("sums"), margin=0.1, num_items=20)
    with pytest.raises(GateFailed) as caught:
        promote(trained, 2)
    assert caught.value.failures[1]["run"] == tuple(
        f"openmint evaluate ann/math@{digest_of(word)} --task {digest_of('sums')} --n 20"
        for word in (2, 1)
    )


def test_an_evaluation_counts_with_enough_items_of_the_newest_task(trained: Catalog) -> None:
    add_gate(trained, min_score=0.5)
    evaluate(trained, 2, right(10, 10))
    with pytest.raises(GateFailed, match="no evaluation on 40 items"):
        promote(trained, 2)
    evaluate(trained, 2, right(40))
    trained.put_task(ANN, "sums", digest_of("harder"), {"items": [1] * 10})
    with pytest.raises(GateFailed, match="no evaluation on 10 items"):
        promote(trained, 2)
    evaluate(trained, 2, right(6, 10), task=digest_of("harder"))
    assert promote(trained, 2) == digest_of(2)


def test_the_newest_evaluation_counts(trained: Catalog) -> None:
    add_gate(trained, min_score=0.5)
    evaluate(trained, 2, right(40))
    evaluate(trained, 2, right(1))
    with pytest.raises(GateFailed):
        promote(trained, 2)


def test_an_unfinished_evaluation_does_not_count(trained: Catalog) -> None:
    add_gate(trained, min_score=0.0)
    started = trained.start_evaluation(
        ANN,
        policy_name="math",
        digest=digest_of(2),
        base_name="tiny",
        task_name="sums",
        task_digest=digest_of("sums"),
        num_items=NUM_ITEMS,
    )
    with pytest.raises(GateFailed):
        promote(trained, 2)
    trained.fail_evaluation(ANN, started.evaluation_id, "broken")
    with pytest.raises(GateFailed):
        promote(trained, 2)


def test_a_revision_is_compared_item_by_item_with_what_is_served(trained: Catalog) -> None:
    """The same two scores: 30 and 28 of 40 right. Only the pairs tell whether that is noise."""
    add_gate(trained, margin=0.16)
    evaluate(trained, 1, right(30))
    evaluate(trained, 2, right(28))
    spread = [i < 20 or i >= 32 for i in range(NUM_ITEMS)]  # ten lost, eight gained
    evaluate(trained, 3, spread)
    with pytest.raises(GateFailed) as caught:
        promote(trained, 3)
    (failure,) = caught.value.failures
    assert failure["score"] == 0.7 and failure["bound"] < -0.16
    assert promote(trained, 2) == digest_of(2)


def test_only_evaluations_that_were_sampled_alike_are_compared(trained: Catalog) -> None:
    add_gate(trained, margin=0.05)
    evaluate(trained, 1, right(30))
    evaluate(trained, 2, right(30), temperature=1.0)
    with pytest.raises(GateFailed, match="no evaluation on 40 items at temperature 1; run") as told:
        promote(trained, 2)
    (failure,) = told.value.failures
    command = f"openmint evaluate ann/math@{digest_of(1)} --task sums --temperature 1"
    assert failure["run"] == (command,)
    evaluate(trained, 1, right(29), temperature=1.0)
    evaluate(trained, 1, right(40))
    assert promote(trained, 2) == digest_of(2)


def test_what_is_served_first_is_compared_with_nothing(trained: Catalog) -> None:
    add_gate(trained, alias="staging", margin=0.0)
    evaluate(trained, 2, right(0))
    moved = trained.promote(ANN, "math", "staging", digest_of(2), actor="ann")
    assert moved.digest == digest_of(2)


def test_an_override_is_kept_in_history_and_audit(trained: Catalog) -> None:
    gate = add_gate(trained, min_score=0.5)
    promote(trained, 2, override="an incident")
    assert trained.alias_history(ANN, "math", "prod")[0].override_reason == "an incident"
    event = trained.audit(ANN)[0]
    assert event.action == "alias.promote"
    assert event.details["override_reason"] == "an incident"
    assert event.details["overridden"][0]["gate_id"] == gate.gate_id
    evaluate(trained, 3, right(40))
    promote(trained, 3, override="not needed")
    assert trained.alias_history(ANN, "math", "prod")[0].override_reason is None


def test_a_rollback_is_never_held_back(trained: Catalog) -> None:
    promote(trained, 2)
    add_gate(trained, min_score=1.0)
    assert trained.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(1)


def test_setting_an_alias_is_no_way_around(trained: Catalog) -> None:
    add_gate(trained, min_score=0.5)
    with pytest.raises(GateFailed):
        trained.set_alias(ANN, "math", "prod", digest_of(2), actor="ann")
    free = trained.set_alias(ANN, "math", "other", digest_of(2), actor="ann")
    assert free.digest == digest_of(2)


def test_a_gate_is_listed_and_removed_by_its_alias(trained: Catalog) -> None:
    gate = add_gate(trained, min_score=0.5)
    assert trained.gates(ANN, "math", "prod") == [gate]
    assert trained.gates(ANN, "math", "other") == []
    for tenant, alias in ((BOB, "prod"), (ANN, "other")):
        with pytest.raises(NotFound):
            trained.remove_gate(tenant, "math", alias, gate.gate_id, actor="x")
    trained.remove_gate(ANN, "math", "prod", gate.gate_id, actor="ann")
    assert promote(trained, 2) == digest_of(2)
    actions = [event.action for event in trained.audit(ANN)]
    assert actions[:3] == ["alias.promote", "gate.delete", "gate.create"]


def test_gates_that_cannot_be_are_refused(trained: Catalog) -> None:
    with pytest.raises(NotFound, match="task"):
        add_gate(trained, "unknown", min_score=0.5)
    with pytest.raises(InvalidRequest, match="follows every save"):
        add_gate(trained, alias="latest", min_score=0.5)
    for both in ({}, {"min_score": 0.5, "margin": 0.1}):
        with pytest.raises(InvalidRequest, match="either"):
            add_gate(trained, **both)  # type: ignore[arg-type]
    for _ in range(32):
        add_gate(trained, min_score=0.5)
    with pytest.raises(Conflict, match="32"):
        add_gate(trained, min_score=0.5)
