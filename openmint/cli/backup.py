"""`openmint backup`: a copy of a data folder, also of one that a server uses.

What a record names is on disk before the record is, and goes after it. So the catalogue is copied
first, then bytes and journal; should something that it names have gone in between, once more.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from openmint.catalog.database import shown
from openmint.cli.data_folder import ADMIN_KEY_FILE, DATABASE_FILE
from openmint.cli.output import console, progress
from openmint.cli.remote import ConfigOption, FolderOption
from openmint.config import load_settings
from openmint.errors import InvalidRequest, NotFound, StoreFailed
from openmint.journal.update_log import SUFFIX, Segment
from openmint.store.folder_store import FolderStore
from openmint.types import Digest

TRIES = 5
NAMED_BLOBS = """
    SELECT digest FROM revision WHERE deleted_at IS NULL UNION SELECT digest FROM checkpoint
    UNION SELECT snapshot_digest FROM run WHERE snapshot_digest IS NOT NULL
    UNION SELECT needs FROM request WHERE needs IS NOT NULL
"""
NAMED_UPDATES = """
    SELECT request.run_id, request.seq FROM request JOIN run ON run.run_id = request.run_id
    WHERE kind = 'optim_step' AND request.status = 'done' AND body IS NOT NULL
      AND seq > coalesce(run.snapshot_seq, -1)
"""


def register(app: typer.Typer) -> None:
    app.command()(backup)


def backup(
    to: Annotated[Path, typer.Argument(help="Folder of the copy; an earlier one is renewed.")],
    data: FolderOption = None,
    config: ConfigOption = None,
) -> None:
    """Copy a data folder, also while a server uses it. Restore: `openmint serve --data` the copy,
    or a copy of it. Converted bases are left out; they are made again from the packages. So are
    the bytes of a store on S3, whose bucket has versions or copies of its own. Of a catalogue on
    PostgreSQL it says what to do instead."""
    settings = load_settings(config, flags={"data": data})
    data = settings.data
    if settings.database_url:
        raise InvalidRequest(
            f"the catalogue is not in {data} but at {shown(settings.database_url)}: dump it first "
            f"(PostgreSQL: pg_dump --format=custom), then copy {data} without bases/; "
            "docs/operations.md says how both are restored"
        )
    if not (data / DATABASE_FILE).is_file():
        raise InvalidRequest(
            f"{data} holds no {DATABASE_FILE}; give --data, or --config or OPENMINT_DATABASE_URL "
            "where the catalogue is in another place"
        )
    to.mkdir(parents=True, exist_ok=True)
    with progress("copying") as display:
        for _ in range(TRIES):
            _copy_catalogue(data, to)
            if not settings.store_url:
                _copy_blobs(data, to, display)
            _copy_journal(data, to)
            blobs = () if settings.store_url else _missing_blobs(to)
            if not (missing := [*blobs, *_missing_updates(to)]):
                break
        else:
            raise StoreFailed(
                f"what the catalogue names kept going away: {missing[0]}; try again, with "
                "--config or OPENMINT_STORE_URL if the store is on S3"
            )
    if (data / ADMIN_KEY_FILE).is_file():
        shutil.copy2(data / ADMIN_KEY_FILE, to / ADMIN_KEY_FILE)
    console.print(f"{to} is a copy of {data}; `openmint serve --data {to}` goes on from it")
    if settings.store_url:
        console.print(
            f"without adapters and states: {settings.store_url} was not copied. Have the bucket "
            "keep deleted versions for as long as you keep this copy, or replicate it"
        )


def _copy_catalogue(data: Path, to: Path) -> None:
    (to / DATABASE_FILE).unlink(missing_ok=True)
    with (
        closing(sqlite3.connect(data / DATABASE_FILE)) as source,
        closing(sqlite3.connect(to / DATABASE_FILE)) as copy,
    ):
        source.backup(copy)


def _copy_blobs(data: Path, to: Path, display: Progress) -> None:
    """Those that the copied catalogue names, checked against their digests."""
    source, copy = FolderStore(data), FolderStore(to)
    digests = [digest for (digest,) in _rows(to, NAMED_BLOBS) if not copy.exists(Digest(digest))]
    task = display.add_task("copying", total=len(digests))

    def found() -> Iterator[bytes]:
        for digest in digests:
            with suppress(NotFound):  # gone since; the next try has a later catalogue
                yield bytes(source.get(Digest(digest)))
            display.advance(task)

    copy.put_many(found())
    display.remove_task(task)


def _copy_journal(data: Path, to: Path) -> None:
    shutil.rmtree(to / "journal", ignore_errors=True)
    for path in sorted((data / "journal").glob(f"*/*{SUFFIX}")):
        target = to / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except FileNotFoundError:
            target.unlink(missing_ok=True)  # not needed any more, or looked for below


def _missing_blobs(to: Path) -> Iterator[str]:
    """Those that the copied catalogue names and the copy doesn't hold."""
    blobs = FolderStore(to)
    for (digest,) in _rows(to, NAMED_BLOBS):
        if not blobs.exists(Digest(digest)):
            yield digest


def _missing_updates(to: Path) -> Iterator[str]:
    """Those of the copied catalogue that the copied journal doesn't hold."""
    logged = {
        (frame.head["run"], frame.head["seq"])
        for path in (to / "journal").glob(f"*/*{SUFFIX}")
        for frame in Segment.read(path, with_bodies=False).updates
    }
    if logged:  # else nothing is logged here: `worker.durability = "replay"`
        for run_id, seq in _rows(to, NAMED_UPDATES):
            if (run_id, seq) not in logged:
                yield f"the update of request {seq} of {run_id}"


def _rows(to: Path, query: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(to / DATABASE_FILE)) as copy:
        return copy.execute(query).fetchall()
