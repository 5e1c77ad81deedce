"""`openmint journal verify` on logs that are whole, torn and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openmint.journal.update_log import Segment, UpdateLog, folder_of, segments
from openmint.types import Digest, RunId
from tests.servers import run_cli, run_cli_json

BASE = Digest("sha256:" + "0" * 64)


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """Of three updates by two runs."""
    folder = folder_of(tmp_path, BASE)
    log = UpdateLog(folder, BASE, lambda call: call())
    for run, seq in (("a", 1), ("a", 2), ("b", 1)):
        log.append(RunId(run), seq, {}, memoryview(bytearray(100)), lambda error: None)
    log.close()
    (path,) = segments(folder)
    return path


def verify(data: Path) -> dict[str, Any]:
    (verdict,) = run_cli_json("journal", "verify", "--data", str(data))  # type: ignore[misc]
    assert isinstance(verdict, dict)
    return verdict


def test_a_whole_log_is_counted(log_file: Path, tmp_path: Path) -> None:
    verdict = verify(tmp_path)
    assert verdict["num_bytes"] == log_file.stat().st_size
    assert (verdict["updates"], verdict["runs"]) == (3, 2)
    assert (verdict["cut_bytes"], verdict["damaged"]) == (0, 0)


def test_a_torn_end_is_no_damage(log_file: Path, tmp_path: Path) -> None:
    last = Segment.read(log_file, with_bodies=True).updates[-1]
    log_file.write_bytes(log_file.read_bytes()[:-1])
    verdict = verify(tmp_path)
    assert (verdict["updates"], verdict["damaged"]) == (2, 0)
    assert verdict["cut_bytes"] == last.end - last.offset - 1


def test_damage_in_the_middle_is_told_and_fails(log_file: Path, tmp_path: Path) -> None:
    middle = Segment.read(log_file, with_bodies=True).updates[1]
    data = bytearray(log_file.read_bytes())
    data[middle.body_offset + 7] ^= 1
    log_file.write_bytes(data)
    assert "1" in run_cli("journal", "verify", "--data", str(tmp_path), code=1).stdout


def test_a_folder_without_a_journal_is_named(tmp_path: Path) -> None:
    done = run_cli("journal", "verify", "--data", str(tmp_path), code=2)
    assert f"{tmp_path} holds no journal" in done.stderr
