"""Many PEFT adapters of a folder or a tar, packed into the tars that the server takes."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from openmint.errors import InvalidRequest
from openmint.service.archives import CONFIG_FILE, WEIGHTS_FILE, tar_of

BATCH_ADAPTERS, BATCH_BYTES = 500, 32 << 20
"""Of one request, which is one transaction."""

Folder = tuple[str, dict[str, bytes]]
"""The path of a PEFT folder below the source, and its two files."""


def peft_folders(source: Path) -> Iterator[Folder]:
    """Every PEFT folder of a folder, in the order of their paths, or of a tar, in its own order.

    Raises InvalidRequest when there is none, or half of one.
    """
    found = _of_folder(source) if source.is_dir() else _of_tar(source)
    first = next(found, None)
    if first is None:
        raise InvalidRequest(f"{source} holds no {CONFIG_FILE} in a folder of its own")
    yield first
    yield from found


def _of_folder(root: Path) -> Iterator[Folder]:
    for config in sorted(root.rglob(CONFIG_FILE)):
        weights = config.with_name(WEIGHTS_FILE)
        if not weights.is_file():
            raise InvalidRequest(f"{config.parent} holds no {WEIGHTS_FILE}")
        files = {CONFIG_FILE: config.read_bytes(), WEIGHTS_FILE: weights.read_bytes()}
        yield config.parent.relative_to(root).as_posix(), files


def _of_tar(path: Path) -> Iterator[Folder]:
    halves: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path, "r|*") as members:
            for member in members:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                file = members.extractfile(member) if member.isreg() else None
                if file is None or name not in (CONFIG_FILE, WEIGHTS_FILE):
                    continue
                files = halves.setdefault(folder, {})
                files[name] = file.read()
                if len(files) == 2:
                    yield folder, halves.pop(folder)
    except tarfile.TarError as error:
        raise InvalidRequest(f"{path} is not a tar: {error}") from None
    if halves:
        raise InvalidRequest(f"{path} holds half of the PEFT folder {min(halves)!r}")


def batches(folders: Iterable[Folder]) -> Iterator[bytes]:
    """Tars of as many folders as one request should hold."""
    batch: dict[str, bytes] = {}
    num_bytes = 0
    for path, files in folders:
        size = sum(map(len, files.values()))
        if batch and (num_bytes + size > BATCH_BYTES or len(batch) >= 2 * BATCH_ADAPTERS):
            yield tar_of(batch)
            batch, num_bytes = {}, 0
        batch |= {f"{path}/{name}": data for name, data in files.items()}
        num_bytes += size
    if batch:
        yield tar_of(batch)
