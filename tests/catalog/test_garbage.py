"""Bytes that lost a record wait for the collector, and for whoever still uses them."""

from openmint.catalog.catalog import Catalog
from openmint.types import SessionId
from tests.catalog.made import ANN, BASE, RUN, SESSION, add_run, blob, digest_of

SAMPLER = "sampler_weights"


def test_what_an_overwrite_replaced_is_doomed(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.add_checkpoint(ANN, RUN, "weights", "rolling", blob(1))
    catalog.add_checkpoint(ANN, RUN, "weights", "rolling", blob(2), overwrite=True)
    assert catalog.unused_blobs() == [digest_of(1)]
    catalog.forget_blobs([digest_of(1)])
    assert catalog.unused_blobs() == []


def test_a_deleted_revision_dooms_its_bytes_across_a_restart(catalog: Catalog, url: str) -> None:
    catalog.add_run_revision(ANN, add_run(catalog), blob(1), ephemeral=False)
    catalog.delete_revision(ANN, "math", digest_of(1), actor="ann")
    reopened = Catalog.open(url)
    assert reopened.unused_blobs() == [digest_of(1)]
    reopened.close()


def test_bytes_saved_again_are_doomed_no_longer(catalog: Catalog) -> None:
    add_run(catalog)
    catalog.add_checkpoint(ANN, RUN, "weights", "one", blob(1))
    catalog.delete_checkpoint(ANN, RUN, "weights", "one", actor="ann")
    catalog.add_checkpoint(ANN, RUN, "weights", "two", blob(1))
    assert catalog.unused_blobs() == []
    catalog.forget_blobs([])
    catalog.delete_checkpoint(ANN, RUN, "weights", "two", actor="ann")
    assert catalog.unused_blobs() == [digest_of(1)]


def test_an_open_sessions_sampler_keeps_the_bytes_that_it_is_bound_to(catalog: Catalog) -> None:
    """Two sessions of one policy made the same bytes; the one that made them first ends first."""
    catalog.add_run_revision(ANN, add_run(catalog), blob(1), ephemeral=True)
    other = SessionId("0ther")
    catalog.add_run_revision(ANN, add_run(catalog, session=other), blob(1), ephemeral=True)
    bound = {"base": BASE, "revision": digest_of(1), "model_path": None}
    catalog.add_sampler(ANN, f"{other}:sample:0", session_id=other, **bound)
    catalog.finish_session(ANN, SESSION, reason="success")
    catalog.delete_ephemeral_of_ended()
    assert catalog.unused_blobs() == []
    catalog.finish_session(ANN, other, reason="success")
    assert catalog.unused_blobs() == [digest_of(1)]
