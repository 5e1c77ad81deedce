"""Packs as tests want them: small, damaged, on a disk that refuses."""

from __future__ import annotations

from pathlib import Path

from openmint.store.folder_store import FolderStore
from openmint.store.pack_frames import HEADER
from openmint.types import Digest


def raw(digest: Digest) -> bytes:
    return bytes.fromhex(digest.removeprefix("sha256:"))


def packs_in(root: Path) -> list[Path]:
    return sorted((root / "packs").glob("*.pack"))


def indexes_in(root: Path) -> list[Path]:
    return sorted((root / "packs").glob("*.idx"))


def flip(path: Path, offset: int) -> None:
    """Change one bit of a byte."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def damage(root: Path, digest: Digest, at: int = 0) -> None:
    """Change a bit of a small blob, in each copy of it; from the 52nd byte before it on, of its
    frame's header."""
    for copy in FolderStore(root)._packs.find(raw(digest)):
        flip(root / "packs" / f"{copy.pack}.pack", copy.offset + HEADER.size + at)
