"""`openmint keys` on a data folder: what it prints, what it refuses, what it exits with."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer

from openmint.cli.data_folder import write_admin_key
from openmint.cli.keys import parse_ttl
from tests.servers import run_cli, run_cli_json


def create(data: Path, *options: str) -> str:
    return run_cli("keys", "create", "--data", str(data), "--tenant", "acme", *options).stdout


def test_a_new_key_is_printed_alone_and_listed_without_its_secret(tmp_path: Path) -> None:
    key = create(tmp_path, "--role", "serve", "--ttl", "30d", "--note", "robot").strip()
    assert key.startswith("tml-")
    listed: Any = run_cli_json("keys", "list", "--data", str(tmp_path))
    assert [(item["tenant"], item["role"], item["note"]) for item in listed] == [
        ("acme", "serve", "robot")
    ]
    assert listed[0]["expires_at"]
    assert key.rsplit("_", 1)[1] not in str(listed)


def test_a_settings_file_says_where_the_keys_are(tmp_path: Path) -> None:
    config, data = tmp_path / "openmint.toml", tmp_path / "data"
    database = tmp_path / "elsewhere.db"
    config.write_text(f'data = "{data}"\ndatabase_url = "sqlite:///{database}"\n')
    at = ("--config", str(config))
    run_cli("keys", "create", *at, "--tenant", "acme")
    listed: Any = run_cli_json("keys", "list", *at)
    assert [item["tenant"] for item in listed] == ["acme"]
    run_cli("keys", "revoke", listed[0]["key_id"], "--tenant", "acme", "--yes", *at)
    assert database.is_file()
    assert not (data / "openmint.db").exists()


def test_a_revoked_key_says_so(tmp_path: Path) -> None:
    create(tmp_path)
    first: Any = run_cli_json("keys", "list", "--data", str(tmp_path))
    target = ("keys", "revoke", first[0]["key_id"], "--tenant", "acme", "--data", str(tmp_path))
    assert "--yes" in run_cli(*target, code=2).stderr
    run_cli(*target, "--yes")
    after: Any = run_cli_json("keys", "list", "--data", str(tmp_path))
    assert after[0]["revoked_at"]


def test_exit_codes_tell_usage_from_not_found(tmp_path: Path) -> None:
    create(tmp_path)
    data = ("--data", str(tmp_path))
    assert "90d" in run_cli("keys", "create", *data, "--tenant", "a", "--ttl", "x", code=2).stderr
    assert "role" in run_cli("keys", "create", *data, "--tenant", "a", "--role", "z", code=2).stderr
    assert "match" in run_cli("keys", "create", *data, "--tenant", "../a", code=2).stderr
    run_cli("keys", "revoke", "nothing", *data, "--tenant", "acme", "--yes", code=3)
    elsewhere = tmp_path / "none"
    assert "openmint.db" in run_cli("keys", "list", "--data", str(elsewhere), code=2).stderr


@pytest.mark.parametrize("ttl", ["36501d", "9999999d", "9999999999s", "9" * 90 + "d"])
def test_a_lifetime_over_the_limit_is_refused_with_the_limit(
    ttl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as left:
        parse_ttl(ttl)
    assert left.value.exit_code == 2
    assert "36500d" in capsys.readouterr().err


def test_the_longest_lifetime_is_accepted() -> None:
    assert parse_ttl("36500d") == timedelta(days=36_500)
    assert parse_ttl("90m") == timedelta(minutes=90)


def test_a_piped_table_is_plain_tab_separated_text(tmp_path: Path) -> None:
    create(tmp_path)
    line = run_cli("keys", "list", "--data", str(tmp_path)).stdout.splitlines()[0]
    assert "\x1b" not in line
    assert line.split("\t")[1:3] == ["acme", "train"]


def test_the_admin_key_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = write_admin_key(tmp_path, "tml-om_x_y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "tml-om_x_y\n"
