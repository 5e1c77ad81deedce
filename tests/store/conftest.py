"""Stores of every kind, for what all of them promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from openmint.store.blobs import BlobStore
from openmint.store.opening import open_store
from openmint.types import Digest


@dataclass(frozen=True)
class Place:
    """Where a store is, and the way to it behind its back."""

    url: str
    folder: Path
    names: Callable[[], list[str]]
    """What lies there, one name for each copy of a blob."""
    damage: Callable[[Digest, bytes], None]
    """Have other bytes lie under a large blob's digest."""

    def opened(self) -> BlobStore:
        return open_store(self.url, self.folder)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty store."""
    if request.param == "folder":
        blobs = tmp_path / "blobs"

        def write(digest: Digest, data: bytes) -> None:
            name = digest.removeprefix("sha256:")
            (blobs / name[:2] / name[2:4] / name).write_bytes(data)

        return Place(
            "", tmp_path, lambda: [path.name for path in blobs.rglob("*") if path.is_file()], write
        )
    s3 = request.getfixturevalue("s3")
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    url = s3.new_url()
    return Place(
        url,
        tmp_path,
        lambda: s3.object_names(url),
        lambda digest, data: s3.write(url, f"blobs/{digest.removeprefix('sha256:')}", data),
    )


@pytest.fixture
def store(place: Place) -> BlobStore:
    return place.opened()
