from dataclasses import dataclass, field

import pytest

from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Segment
from openmint.errors import Conflict, NotFound
from openmint.types import BaseInfo, RunId, SessionId, Tenant
from tests.catalog.made import ANN, BASE, BOB, RUN, SESSION, add_run, blob, digest_of

SAMPLER: Segment = "sampler_weights"
COPY_SESSION = SessionId("c0")
COPY_RUN = RunId("c0:train:0")


def test_a_sampler_checkpoint_is_a_revision_and_the_latest_one(catalog: Catalog) -> None:
    add_run(catalog)
    saved = catalog.add_checkpoint(ANN, RUN, SAMPLER, "one", blob(1), user_metadata={"k": "v"})
    assert catalog.checkpoint(ANN, RUN, SAMPLER, "one") == saved
    assert (saved.base_digest, saved.policy_name, saved.public) == (BASE.digest, "math", False)
    assert catalog.revision(ANN, "math", saved.digest).user_metadata == {"k": "v"}
    assert catalog.resolve(ANN, "ann/math").revision.digest == saved.digest


def test_a_training_checkpoint_is_no_revision(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.add_checkpoint(ANN, RUN, "weights", "one", blob(1, 7))
    assert catalog.revisions(ANN, "math", ephemeral=True) == []
    assert catalog.run(ANN, RUN).num_optim_steps == 7


def test_a_name_is_taken_unless_overwritten(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.add_checkpoint(ANN, RUN, SAMPLER, "one", blob(1))
    catalog.set_checkpoint_public(ANN, RUN, SAMPLER, "one", True, actor="ann")
    assert catalog.add_checkpoint(ANN, RUN, SAMPLER, "one", blob(1)).public
    with pytest.raises(Conflict, match="overwrite"):
        catalog.add_checkpoint(ANN, RUN, SAMPLER, "one", blob(2))
    assert catalog.resolve(ANN, "ann/math").revision.digest == digest_of(1)
    replaced = catalog.add_checkpoint(ANN, RUN, SAMPLER, "one", blob(2), overwrite=True)
    assert (replaced.digest, replaced.public) == (digest_of(2), False)
    assert catalog.resolve(ANN, "ann/math").revision.digest == digest_of(2)


def test_only_a_published_checkpoint_is_read_by_others(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.add_checkpoint(ANN, RUN, SAMPLER, "one", blob(1))
    with pytest.raises(NotFound):
        catalog.readable_checkpoint(BOB, RUN, SAMPLER, "one")
    with pytest.raises(NotFound):
        catalog.set_checkpoint_public(BOB, RUN, SAMPLER, "one", True, actor="bob")
    catalog.set_checkpoint_public(ANN, RUN, SAMPLER, "one", True, actor="ann")
    assert catalog.readable_checkpoint(BOB, RUN, SAMPLER, "one").tenant == ANN
    with pytest.raises(NotFound):
        catalog.checkpoint(BOB, RUN, SAMPLER, "one")
    with pytest.raises(NotFound):
        catalog.delete_checkpoint(BOB, RUN, SAMPLER, "one", actor="bob")
    catalog.set_checkpoint_public(ANN, RUN, SAMPLER, "one", False, actor="ann")
    with pytest.raises(NotFound):
        catalog.readable_checkpoint(BOB, RUN, SAMPLER, "one")


def test_an_expired_checkpoint_is_as_good_as_gone(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.add_checkpoint(ANN, RUN, "weights", "one", blob(1), ttl_seconds=3600)
    assert catalog.checkpoint(ANN, RUN, "weights", "one").expires_at is not None
    assert catalog.expired_checkpoints() == []
    catalog.set_checkpoint_ttl(ANN, RUN, "weights", "one", -1)
    with pytest.raises(NotFound):
        catalog.checkpoint(ANN, RUN, "weights", "one")
    with pytest.raises(NotFound):
        catalog.set_checkpoint_ttl(ANN, RUN, "weights", "one", None)
    assert catalog.checkpoints(ANN) == ([], 0)
    assert [expired.name for expired in catalog.expired_checkpoints()] == ["one"]
    catalog.delete_checkpoint(ANN, RUN, "weights", "one", actor="expiry")
    assert catalog.unused_blobs() == [digest_of(1)]
    assert catalog.expired_checkpoints() == []
    catalog.add_checkpoint(ANN, RUN, "weights", "one", blob(2))


def test_a_ttl_can_be_taken_back(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.add_checkpoint(ANN, RUN, "weights", "one", blob(1), ttl_seconds=3600)
    assert catalog.set_checkpoint_ttl(ANN, RUN, "weights", "one", None).expires_at is None


def test_deleting_gives_bytes_up_only_when_nothing_needs_them(catalog: Catalog) -> None:
    add_run(catalog)
    for name in ("one", "two"):
        catalog.add_checkpoint(ANN, RUN, SAMPLER, name, blob(1))
    catalog.add_checkpoint(ANN, RUN, SAMPLER, "three", blob(3))
    catalog.delete_checkpoint(ANN, RUN, SAMPLER, "one", actor="ann")
    assert catalog.unused_blobs() == []
    catalog.delete_checkpoint(ANN, RUN, SAMPLER, "two", actor="ann")
    assert catalog.unused_blobs() == [digest_of(1)]
    with pytest.raises(NotFound):
        catalog.revision(ANN, "math", digest_of(1))
    # What `latest` names stays, though its checkpoint goes.
    catalog.delete_checkpoint(ANN, RUN, SAMPLER, "three", actor="ann")
    assert catalog.unused_blobs() == [digest_of(1)]
    assert catalog.resolve(ANN, "ann/math").revision.digest == digest_of(3)
    with pytest.raises(NotFound):
        catalog.delete_checkpoint(ANN, RUN, SAMPLER, "three", actor="ann")


def test_what_was_promoted_once_outlives_its_checkpoint(catalog: Catalog) -> None:
    add_run(catalog)
    for i in (1, 2):
        catalog.add_checkpoint(ANN, RUN, SAMPLER, f"{i}", blob(i))
        catalog.promote(ANN, "math", "prod", digest_of(i), actor="ann")
    catalog.delete_checkpoint(ANN, RUN, SAMPLER, "1", actor="ann")
    assert catalog.unused_blobs() == []
    assert catalog.rollback(ANN, "math", "prod", actor="ann").digest == digest_of(1)


def test_checkpoints_are_listed_newest_first(catalog: Catalog) -> None:
    add_run(catalog)
    for i in range(3):
        catalog.add_checkpoint(ANN, RUN, "weights", f"{i}", blob(i))
    other = add_run(catalog, session="other")
    catalog.add_checkpoint(ANN, other, "weights", "9", blob(9))
    assert [c.name for c in catalog.run_checkpoints(ANN, RUN)] == ["2", "1", "0"]
    page, total = catalog.checkpoints(ANN, limit=2, offset=1)
    assert ([c.name for c in page], total) == (["2", "1"], 4)
    of_session = sum(blob(i).size_bytes for i in range(3))
    assert catalog.checkpoint_usage(ANN) == (4, of_session + blob(9).size_bytes)
    assert catalog.checkpoint_usage(ANN, session_id=SESSION) == (3, of_session)
    assert catalog.checkpoint_usage(BOB) == (0, 0)
    with pytest.raises(NotFound):
        catalog.run_checkpoints(BOB, RUN)


@dataclass(frozen=True)
class CopyOfRun:
    tenant: Tenant = BOB
    session_id: SessionId = COPY_SESSION
    run_id: RunId = COPY_RUN
    policy: str = "copy"
    base: BaseInfo = BASE
    user_metadata: dict[str, str] = field(default_factory=dict)


def test_a_copy_shares_the_bytes_and_outlives_its_source(catalog: Catalog) -> None:
    add_run(catalog)
    source = catalog.add_checkpoint(ANN, RUN, "weights", "one", blob(1))
    catalog.add_session(BOB, COPY_SESSION)
    copy = catalog.copy_checkpoint(source, CopyOfRun(), 3600)
    assert (copy.tenant, copy.digest, copy.policy_name) == (BOB, source.digest, "copy")
    assert copy.expires_at is not None
    assert catalog.copy_checkpoint(source, CopyOfRun()).digest == source.digest
    catalog.delete_checkpoint(ANN, RUN, "weights", "one", actor="ann")
    assert catalog.unused_blobs() == []
    with pytest.raises(NotFound):
        catalog.copy_checkpoint(source, CopyOfRun())


def test_a_sampler_stays_bound_to_what_it_was_made_for(catalog: Catalog) -> None:
    catalog.add_session(ANN, SESSION)

    def add(path: str | None) -> object:
        return catalog.add_sampler(
            ANN,
            f"{SESSION}:sample:0",
            session_id=SESSION,
            base=BASE,
            revision=digest_of(1),
            model_path=path,
        )

    made = add("tinker://x")
    assert add("tinker://x") == made == catalog.sampler(ANN, f"{SESSION}:sample:0")
    assert catalog.samplers_of_session(ANN, SESSION) == [made]
    with pytest.raises(Conflict):
        add(None)
    with pytest.raises(NotFound):
        catalog.sampler(BOB, f"{SESSION}:sample:0")
