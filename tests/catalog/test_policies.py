import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Filters
from openmint.catalog.search import EVERYTHING
from openmint.errors import Conflict, InvalidRequest, NotFound
from openmint.types import LoraSpec, RunId
from tests.catalog.made import ANN, BASE, BOB, RUN, SESSION, SPEC, add_run, base_named


def test_a_policy_belongs_to_one_base(catalog: Catalog) -> None:
    made = catalog.get_or_create_policy(ANN, "math", BASE)
    assert catalog.get_or_create_policy(ANN, "math", BASE) == made == catalog.policy(ANN, "math")
    with pytest.raises(InvalidRequest, match="tiny, not other"):
        catalog.get_or_create_policy(ANN, "math", base_named("other"))


def test_tenants_have_their_own_policies(catalog: Catalog) -> None:
    mine = catalog.get_or_create_policy(ANN, "math", BASE)
    with pytest.raises(NotFound):
        catalog.policy(BOB, "math")
    theirs = catalog.get_or_create_policy(BOB, "math", base_named("other"))
    assert theirs.policy_id != mine.policy_id
    assert catalog.num_policies(ANN) == 1


def test_policies_are_paged_and_searched_by_name(catalog: Catalog) -> None:
    names = ["a-1", "a-2", "a_1", "b-1", "c"]
    for name in reversed(names):
        catalog.get_or_create_policy(ANN, name, BASE)
    seen, cursor = [], None
    while True:
        page = catalog.policies(ANN, limit=2, cursor=cursor)
        seen += [policy.name for policy in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == names

    def found(filters: Filters = EVERYTHING, search: str | None = None) -> list[str]:
        return [policy.name for policy in catalog.policies(ANN, filters, search=search).items]

    assert found(Filters(prefix="a-")) == ["a-1", "a-2"]
    assert found(search="-1") == ["a-1", "b-1"]
    assert found(search="_") == ["a_1"]
    assert catalog.policies(ANN, limit=5).next_cursor is None


def test_a_run_is_registered_once(catalog: Catalog) -> None:
    add_run(catalog)
    first = catalog.run(ANN, RUN)
    add_run(catalog)
    assert catalog.run(ANN, RUN) == first
    assert (first.policy_name, first.base_digest, first.spec) == ("math", BASE.digest, SPEC)
    other = {"session_id": SESSION, "policy": "math", "base": BASE}
    with pytest.raises(Conflict):
        catalog.add_run(ANN, RUN, spec=LoraSpec(4), **other)  # type: ignore[arg-type]


def test_a_run_needs_a_session_of_its_tenant(catalog: Catalog) -> None:
    catalog.add_session(ANN, SESSION)
    with pytest.raises(NotFound):
        catalog.add_run(BOB, RUN, session_id=SESSION, policy="math", base=BASE, spec=SPEC)
    with pytest.raises(NotFound):
        catalog.policy(BOB, "math")


def test_a_run_of_another_base_adds_nothing(catalog: Catalog) -> None:
    add_run(catalog)
    run_id = RunId("5e55:train:1")
    base = base_named("other")
    with pytest.raises(InvalidRequest):
        catalog.add_run(ANN, run_id, session_id=SESSION, policy="math", base=base, spec=SPEC)
    with pytest.raises(NotFound):
        catalog.run(ANN, run_id)


def test_runs_are_listed_newest_first_with_their_number(catalog: Catalog) -> None:
    runs = [add_run(catalog, n=n) for n in range(3)]
    add_run(catalog, session="other")
    catalog.set_session_project(ANN, SESSION, "p")
    page, total = catalog.runs(ANN, limit=2, project_id="p")
    assert ([run.run_id for run in page], total) == (runs[:0:-1], 3)
    assert catalog.runs(ANN)[1] == 4
    assert catalog.runs(BOB) == ([], 0)
    assert [run.run_id for run in catalog.runs_of_session(ANN, SESSION)] == runs


def test_a_run_shows_when_it_was_last_asked(catalog: Catalog) -> None:
    before = catalog.run(ANN, add_run(catalog)).last_request_at
    catalog.touch_run(ANN, RUN, num_optim_steps=3)
    after = catalog.run(ANN, RUN)
    assert after.last_request_at > before
    assert after.num_optim_steps == 3
    with pytest.raises(NotFound):
        catalog.touch_run(BOB, RUN)


def test_live_runs_can_be_lost(catalog: Catalog) -> None:
    add_run(catalog)
    add_run(catalog, n=1)
    assert catalog.lose_runs([RUN]) == 1
    assert catalog.lose_runs() == 1
    assert catalog.run(ANN, RUN).status == "lost"
