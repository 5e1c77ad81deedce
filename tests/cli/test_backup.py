"""A copy made of a busy service's folder has everything acknowledged in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tinker
from tinker import types

from openmint.catalog.catalog import Catalog
from openmint.cli.backup import backup
from openmint.errors import StoreFailed
from openmint.store import packs
from openmint.store.blobs import digest_of
from openmint.store.folder_store import FolderStore
from tests.catalog.made import ANN, RUN, Blob, add_run
from tests.chaos.training import Job, digests_of
from tests.servers import run_cli, start_server, stop_server, wait_until_ready

pytestmark = pytest.mark.integration

JOB = Job(1, "cross_entropy")


def step(run: tinker.TrainingClient, number: int) -> None:
    run.forward_backward(JOB.data(number), JOB.loss).result()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def test_a_copy_of_a_busy_folder_goes_on_from_there(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """The folder is lost after the copy, and the copy takes its place."""
    data, copy = tmp_path / "data", tmp_path / "copy"
    bases = [str(tiny_base("llama"))]
    # One request is lost with the folder; nobody need wait long for it.
    environ = {"OPENMINT_SERVICE_SEQ_GAP_SECONDS": "0.5"}
    server = start_server(tmp_path, data, bases=bases, environ=environ)
    port = int(server.url.rpartition(":")[2])
    try:
        wait_until_ready(server)
        with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
            run = service.create_lora_training_client("tiny-llama", rank=2, seed=1).result()
            for number in range(3):
                step(run, number)
            path = run.save_state("kept").result().path
            run_cli("backup", str(copy), "--data", str(data))
            step(run, 3)
            run_cli("backup", str(copy), "--data", str(data))
            expected = digests_of(data, [path, run.save_state("after").result().path])
            server.process.kill()
            server.process.wait()
            shutil.rmtree(data)
            shutil.copytree(copy, data)
            server = start_server(tmp_path, data, bases=bases, environ=environ, port=port)
            wait_until_ready(server)
            # The client never learned that its save is in the lost folder alone.
            again = run.save_state("again").result().path
            assert digests_of(data, [path, again]) == expected
    finally:
        stop_server(server)


def test_small_blobs_come_along_wherever_they_lie_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are named, of packs that grow and packs that were compacted; once."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)
    data, copy = tmp_path / "data", tmp_path / "copy"
    store = FolderStore(data)
    catalog = Catalog.open(f"sqlite:///{data / 'openmint.db'}")
    run_id = add_run(catalog)
    kept, unnamed = [], store.put_many(b"unnamed %d" % number for number in range(40))
    for number in range(10):
        kept.append(store.put(b"named %d" % number * 5))
        catalog.add_checkpoint(ANN, run_id, "weights", str(number), Blob(kept[-1]))
        for digest in unnamed[4 * number : 4 * number + 3]:
            store.delete(digest)
        store.compact()
        backup(copy, data)
    catalog.close()
    copied = FolderStore(copy)
    assert [copied.get(digest) for digest in kept] == [store.get(digest) for digest in kept]
    assert not any(copied.exists(digest) for digest in unnamed)
    before = {path: path.stat().st_size for path in (copy / "packs").iterdir()}
    backup(copy, data)
    assert {path: path.stat().st_size for path in (copy / "packs").iterdir()} == before


def test_a_folder_without_a_catalogue_is_refused(tmp_path: Path) -> None:
    done = run_cli("backup", str(tmp_path / "copy"), "--data", str(tmp_path), code=2)
    assert "holds no openmint.db" in done.stderr


def test_a_catalogue_on_postgresql_is_not_copied_in_part(tmp_path: Path) -> None:
    environ = {"OPENMINT_DATABASE_URL": "postgresql://ann:secret@host/db"}
    copy = tmp_path / "copy"
    done = run_cli("backup", str(copy), "--data", str(tmp_path), code=2, environ=environ)
    assert "pg_dump" in done.stderr
    assert "secret" not in done.stderr
    assert not copy.exists()


def test_of_a_store_on_s3_the_rest_is_copied_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    data.mkdir()
    catalog = Catalog.open(f"sqlite:///{data / 'openmint.db'}")
    digest = digest_of(b"in the bucket")
    catalog.add_checkpoint(ANN, add_run(catalog), "weights", "one", Blob(digest))
    catalog.close()
    with pytest.raises(StoreFailed, match=f"{digest}; try again, with --config"):
        backup(copy, data)
    # Nobody is there, and nobody is asked.
    config = tmp_path / "openmint.toml"
    config.write_text(f'data = "{data}"\nstore_url = "s3://bucket/prefix"\n')
    backup(copy, config=config)
    said = " ".join(capsys.readouterr().out.split())
    assert "without adapters and states: s3://bucket/prefix was not copied" in said
    copied = Catalog.open(f"sqlite:///{copy / 'openmint.db'}")
    assert copied.checkpoint(ANN, RUN, "weights", "one").digest == digest
    copied.close()
