"""Python imports this at its start when its folder is in PYTHONPATH: the process dies by `kill -9`
at the n-th time that it, or another one beside it, is about to make something durable.

n is the number in the file that OPENMINT_TEST_CRASH_FILE names, which is counted down; 0 and below
is never. A write of several bytes is made by half first.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

COUNT = struct.Struct("<q")
STANDARD_FILES = 2
"""Writes to them are what a program says, not what it keeps."""
write_now = os.write
busy = threading.local()


def is_last() -> bool:
    """Count down; whether this is the time to die."""
    if getattr(busy, "counting", False):
        return False
    busy.counting = True
    try:
        with Path(os.environ["OPENMINT_TEST_CRASH_FILE"]).open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (left,) = COUNT.unpack(file.read(COUNT.size))
            file.seek(0)
            file.write(COUNT.pack(left - 1))
            return bool(left == 1)
    finally:
        busy.counting = False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(call: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*arguments: Any, **more: Any) -> Any:
        if is_last():
            die()
        return call(*arguments, **more)

    return counting


def write(file: int, data: Any) -> int:
    if file > STANDARD_FILES and is_last():
        write_now(file, memoryview(data)[: len(data) // 2])
        die()
    return write_now(file, data)


def count_commits() -> None:
    """Those of every SQLAlchemy engine."""
    from sqlalchemy import Engine, event

    event.listen(Engine, "commit", counted(lambda connection: None))


def count_objects() -> None:
    """What is asked of S3."""
    import obstore

    for name in ("put", "delete"):
        setattr(obstore, name, counted(getattr(obstore, name)))


class CountLater(MetaPathFinder):
    """Counts what libraries do, once a module of ours is about to load them."""

    def __init__(self) -> None:
        self._waiting = {
            "openmint.catalog.database": count_commits,
            "openmint.store.s3_store": count_objects,
        }

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if count := self._waiting.pop(name, None):
            count()


if "OPENMINT_TEST_CRASH_FILE" in os.environ:
    os.write = write
    for name in ("fsync", "fdatasync", "rename", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    sys.meta_path.insert(0, CountLater())
