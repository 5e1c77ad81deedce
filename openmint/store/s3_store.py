"""Immutable bytes by digest in an S3 bucket, an object each: `<prefix>/blobs/<sha256>`.

What S3 has answered is durable, and what every process sees from then on. Credentials, region and
endpoint are those of the AWS_* environment; none of them is kept or logged here. The module needs
obstore, an optional dependency; `opening.py` imports it when a URL asks for it.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store as Bucket

from openmint.errors import InvalidRequest, NotFound, StoreFailed
from openmint.store.blobs import check, digest_of, name_of
from openmint.types import Digest

SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
URL = re.compile(rf"s3://([a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])((?:/{SEGMENT})*)/?")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
CODE = re.compile(r"<Code>(\w+)</Code>|\(code: (\w+)\)")
"""How S3 names an error, in its own answer and in what obstore makes of a deletion's."""

CONNECT = timedelta(seconds=3)
SILENCE = timedelta(seconds=15)
"""How long a server that was connected to may say nothing."""
TRANSFER = timedelta(minutes=10)
"""How long one request may take that does go on."""
RETRIES, RETRY_WITHIN = 3, timedelta(seconds=10)
"""Of lost connections, timeouts and answers of the class 5xx."""
PARALLEL_PUTS = 16


class S3Store:
    """A `BlobStore` in the bucket and below the prefix of an `s3://bucket/prefix`."""

    def __init__(self, url: str) -> None:
        """Raises InvalidRequest for a URL or an environment that names no bucket."""
        if (parts := URL.fullmatch(url)) is None:
            raise InvalidRequest(
                "store_url must read s3://bucket or s3://bucket/prefix, of letters, digits, dots, "
                "dashes and underscores; credentials and endpoint go into AWS_* variables"
            )
        self._url = url
        self._name, prefix = parts.groups()
        endpoint = next(filter(None, map(os.environ.get, ENDPOINTS)), None)
        self._endpoint = urlsplit(endpoint).netloc.rpartition("@")[2] if endpoint else "AWS"
        try:
            self._bucket = Bucket(
                self._name,
                prefix=prefix.strip("/") or None,
                client_options={
                    "allow_http": bool(endpoint and endpoint.startswith("http://")),
                    "connect_timeout": CONNECT,
                    "read_timeout": SILENCE,
                    "timeout": TRANSFER,
                },
                retry_config={"max_retries": RETRIES, "retry_timeout": RETRY_WITHIN},
            )
        except (BaseError, ValueError) as error:
            raise InvalidRequest(f"the AWS_* variables name no S3: {_first_line(error)}") from None
        self._doomed: set[str] = set()
        self._doomed_lock = threading.Lock()

    def start(self) -> None:
        """See `BlobStore`. Writes, reads, lists and deletes a few bytes, so that a wrong bucket or
        key shows at once and not with the first save."""
        probe = f"probes/{uuid4().hex}"
        with self._saying(f"could not use the store {self._url}"):
            obstore.put(self._bucket, probe, b"openmint")
            obstore.get(self._bucket, probe).bytes()
            self._find_bucket()
            obstore.delete(self._bucket, [probe])

    def put(self, data: bytes) -> Digest:
        """See `BlobStore`. Always sends: only the bytes themselves would tell whether they are
        there undamaged."""
        digest = digest_of(data)
        with self._saying(f"could not write {digest} to the store"):
            obstore.put(self._bucket, _key(digest), data)
        return digest

    def put_many(self, blobs: Iterable[bytes]) -> list[Digest]:
        """See `BlobStore`. So many are on their way at once, and no more are held."""
        digests: list[Digest] = []
        sent: deque[Future[Digest]] = deque()
        with ThreadPoolExecutor(PARALLEL_PUTS, thread_name_prefix="s3") as pool:
            for data in blobs:
                if len(sent) == PARALLEL_PUTS:
                    digests.append(sent.popleft().result())
                sent.append(pool.submit(self.put, data))
            digests.extend(each.result() for each in sent)
        return digests

    def get(self, digest: Digest) -> memoryview:
        key = _key(digest)
        with self._asking(digest, "read"):
            data = memoryview(bytearray(obstore.get(self._bucket, key).bytes()))
        check(digest_of(data), digest)
        return data

    def exists(self, digest: Digest) -> bool:
        _key(digest)  # what is no digest is refused
        try:
            self.size(digest)
        except NotFound:
            return False
        return True

    def size(self, digest: Digest) -> int:
        key = _key(digest)
        with self._asking(digest, "look for"):
            return obstore.head(self._bucket, key)["size"]

    def delete(self, digest: Digest) -> None:
        """See `BlobStore`. `sync_deletions` sends what was asked for here, all at once."""
        with self._doomed_lock:
            self._doomed.add(_key(digest))

    def sync_deletions(self) -> None:
        with self._doomed_lock:
            doomed, self._doomed = self._doomed, set()
        with self._saying("could not delete from the store"):
            obstore.delete(self._bucket, sorted(doomed))

    def compact(self) -> None:
        """See `BlobStore`. There is nothing to do: an object's room goes with it."""

    def _find_bucket(self) -> None:
        """Have S3 say whether the bucket is there, which the answer to HEAD doesn't."""
        next(iter(obstore.list(self._bucket, prefix="probes")), None)

    @contextmanager
    def _asking(self, digest: Digest, verb: str) -> Iterator[None]:
        with self._saying(f"could not {verb} {digest} in the store"):
            try:
                yield
            except FileNotFoundError:
                self._find_bucket()
                raise NotFound(f"the store has no bytes for {digest}") from None

    @contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        """Make what S3 refuses, or the way there, an error of the store. Its cause stays out: it
        quotes the whole answer."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise StoreFailed(f"{what}: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        """What is wrong, and what to do about it. obstore has classes for few errors, and says the
        rest in its text."""
        text = str(error)
        found = CODE.search(text)
        code = (found[1] or found[2]) if found else ""
        if code == "NoSuchBucket":
            return f"{self._endpoint} has no bucket {self._name!r}; create it, or correct store_url"
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError)
        if denied or code == "AccessDenied":
            return (
                f"{self._endpoint} denies it ({code or 'no reason given'}); AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY must be a key that may put, get, delete and list objects of "
                f"bucket {self._name!r}"
            )
        if "/latest/api/token" in text or "/latest/meta-data" in text:
            return "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        if "kind: Timeout" in text:
            return f"{self._endpoint} did not answer in time; a retry may help"
        if "HTTP error" in text:
            return (
                f"{self._endpoint} can't be reached; check AWS_ENDPOINT_URL and the network, "
                "or retry"
            )
        return f"{self._endpoint} failed: {code or _first_line(error)}; a retry may help"


def _key(digest: Digest) -> str:
    return f"blobs/{name_of(digest)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
