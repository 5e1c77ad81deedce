"""What the keeper of the gateway makes of its ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from openmint.cli import supervise

GATEWAY = """
import os, pathlib, signal, sys
ends = pathlib.Path(sys.argv[1])
end, *others = ends.read_text().split()
ends.write_text(" ".join(others))
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end))
"""


def supervised(tmp_path: Path, ends: Sequence[object]) -> subprocess.Popen[str]:
    """A keeper whose gateways end like this, one after the other."""
    (tmp_path / "ends").write_text(" ".join(map(str, ends)))
    (tmp_path / "gateway.py").write_text(GATEWAY)
    gateway = [sys.executable, str(tmp_path / "gateway.py"), str(tmp_path / "ends")]
    command = [sys.executable, supervise.__file__, "0", "0", *gateway]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def outcome(tmp_path: Path, *ends: object) -> tuple[int, int]:
    """The keeper's exit code, and how many gateways it didn't start."""
    keeper = supervised(tmp_path, ends)
    keeper.communicate(timeout=30)
    return keeper.returncode, len((tmp_path / "ends").read_text().split())


def test_the_first_start_that_fails_is_the_last(tmp_path: Path) -> None:
    assert outcome(tmp_path, supervise.FAILED, 0) == (supervise.FAILED, 1)


def test_after_a_crash_a_start_that_fails_is_tried_again(tmp_path: Path) -> None:
    for crash in ("killed", supervise.CRASHED):
        failures = (supervise.FAILED, supervise.FAILED)
        assert outcome(tmp_path, crash, *failures, 0, 0) == (0, 1)


def test_what_no_retry_mends_ends_it(tmp_path: Path) -> None:
    assert outcome(tmp_path, "killed", 2, 0) == (2, 1)


def test_a_signal_between_two_tries_ends_it_at_once(tmp_path: Path) -> None:
    keeper = supervised(tmp_path, ["killed", *[supervise.FAILED] * 20])
    assert keeper.stderr is not None
    while "in 3.2 s" not in keeper.stderr.readline():
        assert keeper.poll() is None
    asked_at = time.monotonic()
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(30) == 0
    keeper.stderr.close()
    assert time.monotonic() - asked_at < 2
