"""`openmint doctor` names what is missing and exits 1 only for what stops the service."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from openmint.cli import doctor
from openmint.config import Settings, load_settings
from tests.postgres import PostgresServer
from tests.s3 import S3Server
from tests.servers import free_port, run_cli, run_cli_json


def settings_of(data: Path) -> Settings:
    return load_settings(flags={"data": data})


def test_every_check_reports(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    findings: Any = run_cli_json("doctor", "--data", str(tmp_path), "--url", url)
    states = {finding["name"]: finding["state"] for finding in findings}
    assert set(states) == {
        "python", "torch", "cores", "memory", "disk", "database", "store", "base", "data", "server",
        "port",
    }  # fmt: skip
    assert states["data"] == "ok"
    assert states["server"] == "warn"


def test_an_old_sqlite_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    assert doctor.check_database(settings_of(tmp_path)).state == "warn"
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    assert doctor.check_database(settings_of(tmp_path)).state == "ok"
    assert not list(tmp_path.iterdir())


def test_a_postgresql_server_is_reached_and_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, postgres: PostgresServer
) -> None:
    monkeypatch.setenv("OPENMINT_DATABASE_URL", postgres.url("postgres"))
    found = doctor.check_database(settings_of(tmp_path))
    assert (found.state, found.detail.split()[0]) == ("ok", "PostgreSQL")
    monkeypatch.setenv("OPENMINT_DATABASE_URL", postgres.url("missing"))
    found = doctor.check_database(settings_of(tmp_path))
    assert found.state == "fail"
    assert "does not exist" in found.detail


def test_a_store_on_s3_is_written_read_and_deleted_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3: S3Server
) -> None:
    url = s3.new_url()
    monkeypatch.setenv("OPENMINT_STORE_URL", url)
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    found = doctor.check_store(settings_of(tmp_path))
    assert (found.state, found.detail) == ("ok", f"{url} takes, gives and deletes bytes")
    assert s3.object_names(url) == []
    monkeypatch.setenv("OPENMINT_STORE_URL", "s3://nowhere")
    found = doctor.check_store(settings_of(tmp_path))
    assert found.state == "fail"
    assert "create it, or correct store_url" in found.detail
    monkeypatch.setenv("OPENMINT_STORE_URL", "ftp://files")
    assert doctor.check_store(settings_of(tmp_path)).state == "fail"
    assert not list(tmp_path.iterdir())


def test_a_settings_file_says_what_the_server_would_use(tmp_path: Path) -> None:
    config = tmp_path / "openmint.toml"
    data, database = tmp_path / "data", "postgresql://ann:secret@127.0.0.1:1/db"
    port = free_port()
    config.write_text(
        f"data = {str(data)!r}\nport = {port}\ndatabase_url = {database!r}\n"
        'store_url = "ftp://files"\n'
    )
    text = run_cli("doctor", "--config", str(config), "--json", code=1).stdout
    details = {finding["name"]: finding["detail"] for finding in json.loads(text)}
    assert "127.0.0.1" in details["database"] and "secret" not in text
    assert "store_url must read s3://" in details["store"]
    assert str(data) in details["data"]
    assert details["port"].startswith(str(port))


def test_a_full_disk_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    assert doctor.check_disk(tmp_path).state == "fail"


def test_the_command_is_readable_when_piped(tmp_path: Path) -> None:
    text = run_cli("doctor", "--data", str(tmp_path)).stdout
    assert "\x1b" not in text
    assert "python" in text
