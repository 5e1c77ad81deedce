import pytest

from openmint.catalog.catalog import Catalog
from openmint.errors import InvalidRequest, NotFound
from openmint.types import Digest
from tests.catalog.made import ANN, BOB, add_run, blob, digest_of

TASK = digest_of("task")


def start(catalog: Catalog, policy: str | None = "math", digest: Digest | None = None) -> int:
    return catalog.start_evaluation(
        ANN,
        policy_name=policy,
        digest=digest,
        base_name="tiny",
        task_name="sums",
        task_digest=TASK,
        num_items=8,
        sampling={"temperature": 0.0},
    ).evaluation_id


def test_a_task_is_known_by_name_and_digest(catalog: Catalog) -> None:
    first = catalog.put_task(ANN, "sums", digest_of(1), {"items": [1]})
    second = catalog.put_task(ANN, "sums", digest_of(2), {"items": [2]})
    assert catalog.put_task(ANN, "sums", digest_of(1), {"items": [1]}) == first
    assert catalog.task(ANN, "sums") == second
    assert catalog.task(ANN, digest_of(1)) == first
    assert catalog.tasks(ANN) == [second, first]
    with pytest.raises(NotFound):
        catalog.task(BOB, "sums")


def test_an_evaluation_ends_with_a_score(catalog: Catalog) -> None:
    catalog.add_checkpoint(ANN, add_run(catalog), "sampler_weights", "one", blob(1))
    running = start(catalog, digest=digest_of(1))
    assert catalog.evaluation(ANN, running).score is None
    done = catalog.finish_evaluation(ANN, running, [i < 6 for i in range(8)])
    assert (done.score, done.status, done.num_items) == (0.75, "finished", 8)
    assert done.finished_at is not None
    assert catalog.evaluations(ANN, policy="math", digest=digest_of(1)) == [done]
    assert catalog.evaluations(ANN, task_name="other") == []
    with pytest.raises(NotFound):
        catalog.evaluation(BOB, running)


def test_a_base_is_evaluated_without_policy(catalog: Catalog) -> None:
    assert catalog.evaluation(ANN, start(catalog, policy=None)).policy_name is None
    with pytest.raises(InvalidRequest):
        start(catalog, policy=None, digest=digest_of(1))


def test_only_revisions_of_the_policy_are_evaluated(catalog: Catalog) -> None:
    add_run(catalog)
    with pytest.raises(NotFound):
        start(catalog, digest=digest_of(1))


def test_evaluations_that_a_stop_cut_off_are_failed(catalog: Catalog) -> None:
    first, second = start(catalog, policy=None), start(catalog, policy=None)
    failed = catalog.fail_evaluation(ANN, first, "no room")
    assert (failed.status, failed.error) == ("failed", "no room")
    assert catalog.fail_running_evaluations("stopped") == 1
    assert catalog.evaluation(ANN, second).error == "stopped"
    assert catalog.evaluation(ANN, first).error == "no room"
    assert [e.evaluation_id for e in catalog.evaluations(ANN, limit=1)] == [second]
    assert [e.evaluation_id for e in catalog.evaluations(ANN, before_id=second)] == [first]
