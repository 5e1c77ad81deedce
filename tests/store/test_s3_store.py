"""What S3 refuses is said with the thing and the remedy, soon, and without anybody's secrets."""

from __future__ import annotations

import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from openmint.errors import InvalidRequest, NotFound, StoreFailed
from openmint.store import s3_store
from openmint.store.blobs import BlobStore, digest_of
from openmint.store.opening import open_store
from openmint.store.s3_store import S3Store
from tests.s3 import BUCKET, KEYS, S3Server
from tests.servers import free_port

DATA = b"weights"
DIGEST = digest_of(DATA)
CALLS: dict[str, Callable[[BlobStore], object]] = {
    "start": lambda store: store.start(),
    "put": lambda store: store.put(DATA),
    "put_many": lambda store: store.put_many([DATA, b"others"]),
    "get": lambda store: store.get(DIGEST),
    "size": lambda store: store.size(DIGEST),
    "exists": lambda store: store.exists(DIGEST),
    "delete": lambda store: (store.delete(DIGEST), store.sync_deletions()),
}
every_call = pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))


def use(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    use(monkeypatch, s3.environ())
    return S3Store(s3.new_url())


@every_call
def test_a_missing_bucket_is_named(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, call: Callable[[BlobStore], object]
) -> None:
    use(monkeypatch, s3.environ())
    with pytest.raises(StoreFailed, match=r"has no bucket 'nowhere'; create it, or correct store_"):
        call(S3Store("s3://nowhere/at/all"))


@every_call
def test_an_endpoint_that_is_down_is_named_and_given_up_soon(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, call: Callable[[BlobStore], object]
) -> None:
    port = free_port()
    use(monkeypatch, s3.environ(endpoint=f"http://127.0.0.1:{port}"))
    started = time.monotonic()
    with pytest.raises(StoreFailed, match=rf"127.0.0.1:{port} can't be reached; check AWS_ENDPOI"):
        call(S3Store(s3.new_url()))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("verb", ["put", "get", "delete"])
def test_an_endpoint_that_says_nothing_is_given_up(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(s3_store, "SILENCE", timedelta(seconds=0.5))
    monkeypatch.setattr(s3_store, "RETRY_WITHIN", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        use(monkeypatch, s3.environ(endpoint=endpoint))
        started = time.monotonic()
        with pytest.raises(StoreFailed, match="did not answer in time"):
            CALLS[verb](S3Store(s3.new_url()))
        assert time.monotonic() - started < 5


def test_the_patience_with_a_dead_endpoint_is_less_than_a_minute() -> None:
    """A try may begin just before the retries end, and last as long as any."""
    longest = s3_store.RETRY_WITHIN + max(s3_store.CONNECT, s3_store.SILENCE)
    assert longest < timedelta(minutes=1)


def test_a_key_that_may_only_read_is_told_what_it_must_be_able_to(
    s3: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.new_url()
    S3Store(url).put(DATA)
    use(monkeypatch, s3.environ("reader"))
    reader = S3Store(url)
    assert reader.get(DIGEST) == DATA
    for verb in ("start", "put", "delete"):
        with pytest.raises(StoreFailed, match=r"denies it \(AccessDenied\).*put, get, delete and"):
            CALLS[verb](reader)
    assert reader.exists(DIGEST)


@every_call
def test_a_wrong_key_is_refused_without_being_shown(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, call: Callable[[BlobStore], object]
) -> None:
    use(monkeypatch, s3.environ() | {"AWS_SECRET_ACCESS_KEY": "wrong-secret"})
    with pytest.raises(StoreFailed, match=r"denies it \((\w+|no reason given)\)") as refused:
        call(S3Store(s3.new_url()))
    shown = "".join(traceback.format_exception(refused.value))
    for secret in ("wrong-secret", *KEYS.values(), "owner", "AWS4-HMAC"):
        assert secret not in shown


def test_no_key_at_all_is_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, s3.environ())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreFailed, match="no credentials; set AWS_ACCESS_KEY_ID"):
        S3Store(s3.new_url()).put(DATA)


def test_a_service_that_comes_back_is_used_again(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same store object, over a server of its own that stops and starts."""
    own = S3Server(s3.program, tmp_path)
    own.start()
    try:
        use(monkeypatch, own.environ())
        store = S3Store(own.new_url())
        store.put(DATA)
        own.stop()
        with pytest.raises(StoreFailed, match="can't be reached"):
            store.get(DIGEST)
        own.start()
        assert store.get(DIGEST) == DATA
    finally:
        own.stop()


def test_deletions_that_failed_are_not_done_later_by_themselves(
    s3: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bytes may have been saved meanwhile."""
    store.put(DATA)
    bucket = store._bucket
    use(monkeypatch, s3.environ(endpoint=f"http://127.0.0.1:{free_port()}"))
    store._bucket = S3Store(s3.new_url())._bucket
    store.delete(DIGEST)
    with pytest.raises(StoreFailed):
        store.sync_deletions()
    store._bucket = bucket
    store.sync_deletions()
    assert store.get(DIGEST) == DATA


def test_a_bucket_has_stores_at_several_prefixes(s3: S3Server, store: S3Store) -> None:
    whole, other = S3Store(f"s3://{BUCKET}"), S3Store(s3.new_url() + "/deep/")
    store.put(DATA)
    for stranger in (whole, other):
        with pytest.raises(NotFound):
            stranger.get(DIGEST)
    other.put(b"others")
    assert not store.exists(digest_of(b"others"))


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket",
        "/srv/blobs",
        "s3://",
        "s3://key:secret@bucket/prefix",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "s3://bucket?region=eu",
        "s3://Bucket",
    ],
)
def test_what_is_no_place_is_refused_without_being_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidRequest, match="s3://bucket/prefix") as refused:
        open_store(url, tmp_path)
    assert "secret" not in str(refused.value)


def test_a_missing_library_is_named_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "openmint.store.s3_store")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'openmint\[s3\]'"):
        open_store("s3://bucket", tmp_path)
