"""`openmint residency` on a log with a known best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openmint.residency.decisions import Decision, DecisionLog, path_of
from openmint.types import Digest
from tests.servers import run_cli, run_cli_json

BASE = Digest("sha256:" + "0" * 64)
NAMES = [Digest(f"sha256:{i:064x}") for i in range(3)]


def test_the_uses_are_replayed_under_each_order(tmp_path: Path) -> None:
    log = DecisionLog(path_of(tmp_path, BASE), 2 << 20)
    for name in NAMES:
        log.note(Decision("load", name, 1 << 20, 0.5))
        log.note(Decision("admit", name, 1 << 20))
    for index in (0, 1, 2, 0, 1, 2):  # three in turn through room for two
        log.note(Decision("want", NAMES[index]))
    log.flush()
    found: Any = run_cli_json("residency", "--data", str(tmp_path))
    loads = {each["order"]: each["loads"] for each in found}
    assert (loads["lru"], loads["belady"]) == (6, 4)
    assert {each["load_seconds"] for each in found if each["order"] == "lru"} == {3.0}
    roomy: Any = run_cli_json("residency", "--data", str(tmp_path), "--memory-mib", "3")
    assert {each["loads"] for each in roomy} == {3}


def test_what_cannot_be_replayed_is_said(tmp_path: Path) -> None:
    assert "no log" in run_cli("residency", "--data", str(tmp_path), code=2).stderr
