"""`kill -9` of the service with its store on a real S3 server, while clients save, import, promote
and delete, and the collector collects: what was acknowledged is there, whole; what was deleted is
gone.

`make chaos` kills 40 times; a test run 4 times.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from openmint.catalog.address import TinkerPath
from openmint.catalog.catalog import Catalog
from openmint.errors import NotFound
from openmint.store.blobs import BlobStore
from openmint.store.opening import open_store
from openmint.types import Digest
from tests.chaos.killing import Killer
from tests.chaos.life import alias_of, delete, headers_of, patiently, promote
from tests.chaos.stored import check_named, named_in
from tests.chaos.training import Job, T
from tests.s3 import S3Server
from tests.servers import TestServer, mortal_server
from tests.tiny import write_adapter

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow]

NUM_KILLS = int(os.environ.get("OPENMINT_CHAOS_KILLS", "20")) // 5
LONGEST_LIFE_SECONDS = 3.0
HOOKS = Path(__file__).parent / "hurrying"
NUM_KEPT_ROUNDS = 2
EVERY_KEPT = 5
"""So many rounds apart are those whose saves are never deleted."""


@dataclass
class Told:
    """What a client was told about a policy: digests that are there, and digests that are not."""

    policy: str
    kept: dict[str, Digest] = field(default_factory=dict)
    deleted: dict[str, Digest] = field(default_factory=dict)
    prod: str = ""

    def delete(self, name: str, call: Callable[[], None]) -> None:
        call()
        self.deleted[name] = self.kept.pop(name)


class Onlooker:
    """Reads, again and again, all that the catalogue names: it is there, and whole, at any time."""

    def __init__(self, data: Path, store: BlobStore) -> None:
        self._data, self._store = data, store
        self._stop = threading.Event()
        self.num_read = 0

    def look_until_stopped(self) -> None:
        while not self._stop.wait(1.0):
            self.num_read += check_named(self._data, self._store)

    def stop(self) -> None:
        self._stop.set()


def digest_at(catalog: Catalog, path: str) -> Digest:
    at = TinkerPath.parse(path)
    return catalog.checkpoint(T, at.run_id, at.segment, at.name).digest


def saved(save: Callable[[str], Any], name: str) -> str:
    """The path. A save of bytes that were being deleted says so, and is made again."""
    while True:
        try:
            return str(save(name).result().path)
        except tinker.RequestFailedError as error:
            if "save again" not in str(error):
                raise


def delete_revision(server: TestServer, policy: str, digest: str) -> None:
    url = f"{server.url}/catalog/v1/policies/default/{policy}/revisions/{digest}"
    answer = patiently(lambda: httpx.delete(url, headers=headers_of(server)))
    # 404 to the second try, or where it went with its checkpoint.
    assert answer.status_code in (204, 404), answer.text


def train(server: TestServer, catalog: Catalog, job: Job, is_over: threading.Event) -> Told:
    """Each round saves one state twice, under two names, and deletes the first of them."""
    told, number = Told(job.policy), 0
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = service.create_lora_training_client(
            "tiny-llama", 4, seed=job.seed, user_metadata={"policy": job.policy}
        ).result()
        while number <= NUM_KEPT_ROUNDS or not is_over.is_set():
            run.forward_backward(job.data(number), job.loss)
            run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            twin = saved(run.save_state, f"twin-{number}")
            revision = saved(run.save_weights_for_sampler, f"revision-{number}")
            delete(server, twin)
            state = saved(run.save_state, f"state-{number}")
            told.kept |= {path: digest_at(catalog, path) for path in (revision, state)}
            promote(server, job.policy, told.kept[revision])
            told.prod = told.kept[revision]
            for path, digest in old_of(told, number):
                told.delete(path, lambda path=path: delete(server, path))
                delete_revision(server, job.policy, digest)
            number += 1
    return told


def old_of(told: Told, number: int) -> list[tuple[str, Digest]]:
    old = number - NUM_KEPT_ROUNDS
    if old % EVERY_KEPT == 0:
        return []
    return [item for item in told.kept.items() if item[0].endswith(f"-{old}")]


def bring_in(server: TestServer, folder: Path, is_over: threading.Event) -> Told:
    """Each round imports three adapters in one request."""
    told, number = Told("imported"), 0
    while number <= NUM_KEPT_ROUNDS or not is_over.is_set():
        for part in range(3):
            write_adapter(folder / str(number) / f"{part}-{number}", seed=3 * number + part)
        told.kept |= imported(server, told.policy, folder / str(number))
        told.prod = next(reversed(told.kept.values()))
        promote(server, told.policy, told.prod)
        for name, digest in old_of(told, number):
            told.delete(name, lambda digest=digest: delete_revision(server, told.policy, digest))
        number += 1
        time.sleep(0.3)  # else the gateway does nothing else while its worker starts
    return told


def imported(server: TestServer, policy: str, folder: Path) -> dict[str, Digest]:
    """Digests of the folder's adapters, by their paths in the archive."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.add(folder, policy)
    url = f"{server.url}/catalog/v1/imports"
    headers = {**headers_of(server), "Content-Type": "application/x-tar"}
    answer = patiently(lambda: httpx.post(url, content=tar.getvalue(), headers=headers, timeout=30))
    assert answer.status_code == 201, answer.text
    items = answer.json()["items"]
    assert not any(item["error"] for item in items), items
    return {item["path"]: Digest(item["digest"]) for item in items}


@pytest.fixture
def store(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BlobStore:
    """An empty one in the bucket, which a server that is started from now on uses too."""
    url = s3.new_url()
    for name, value in {**s3.environ(), "OPENMINT_STORE_URL": url}.items():
        monkeypatch.setenv(name, value)
    return open_store(url, tmp_path)


@pytest.fixture
def server(
    store: BlobStore, tiny_base: Callable[[str], Path], tmp_path: Path
) -> Iterator[TestServer]:
    environ = {
        "PYTHONPATH": f"{HOOKS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OPENMINT_SERVICE_GRACE_SECONDS": "0",
        "OPENMINT_SERVICE_SNAPSHOT_UPDATES": "6",
    }
    bases = [str(tiny_base("llama"))]
    with mortal_server(tmp_path, bases=bases, environ=environ) as server:
        yield server


def wait_for_the_collector(server: TestServer) -> None:
    url = f"{server.url}/catalog/v1/garbage"
    deadline = time.monotonic() + 60
    while httpx.get(url, headers=headers_of(server)).json()["items"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(1800)
def test_what_was_acknowledged_is_in_the_bucket_and_what_was_deleted_is_not(
    server: TestServer, store: BlobStore, s3: S3Server, tmp_path: Path
) -> None:
    killer = Killer(server, NUM_KILLS, seed=2, longest_life_seconds=LONGEST_LIFE_SECONDS)
    onlooker = Onlooker(server.data, store)
    jobs = [Job(seed, "cross_entropy") for seed in range(2)]
    catalog = Catalog.open(f"sqlite:///{server.data / 'openmint.db'}")
    with ThreadPoolExecutor(len(jobs) + 2) as pool:
        looking = pool.submit(onlooker.look_until_stopped)
        killer.start()
        clients = [pool.submit(train, server, catalog, job, killer.is_over) for job in jobs]
        clients.append(pool.submit(bring_in, server, tmp_path / "peft", killer.is_over))
        try:
            all_told = [client.result() for client in clients]
        finally:
            onlooker.stop()
        looking.result()
    assert killer.failure is None, killer.failure
    wait_for_the_collector(server)

    kept = {digest for told in all_told for digest in told.kept.values()}
    deleted = {digest for told in all_told for digest in told.deleted.values()}
    there = {f"sha256:{name[6:]}" for name in s3.object_names(os.environ["OPENMINT_STORE_URL"])}
    assert kept <= named_in(server.data)
    for digest in there:
        store.get(Digest(digest))  # raises for one that isn't whole
    assert kept <= there
    assert deleted and not deleted & there
    for told in all_told:
        assert alias_of(server, told.policy, "prod")["digest"] == told.prod
        body = {"model": f"default/{told.policy}@prod", "prompt": [504], "max_tokens": 1}
        answer = httpx.post(
            f"{server.url}/v1/completions", json=body, headers=headers_of(server), timeout=60
        )
        assert answer.json()["openmint"]["revision"] == told.prod
    for told in all_told[: len(jobs)]:
        assert {path: digest_at(catalog, path) for path in told.kept} == told.kept
        for path in told.deleted:
            with pytest.raises(NotFound):
                digest_at(catalog, path)
    catalog.close()
    print(
        f"killed {killer.killed}; {len(kept)} kept, {len(deleted)} deleted, "
        f"{len(there - named_in(server.data))} that nobody names; read {onlooker.num_read} times"
    )
