"""Settings: later sources win, and a mistake is named."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from openmint import config
from openmint.config import ServiceConfig, Settings, WorkerConfig, load_settings
from openmint.errors import InvalidRequest


def settings_of(tmp_path: Path, toml: str, environ: dict[str, str], **flags: Any) -> Settings:
    path = tmp_path / "openmint.toml"
    path.write_text(toml)
    return load_settings(path, environ, flags)


def test_without_sources_the_defaults_stand() -> None:
    assert load_settings(environ={}) == Settings()


def test_toml_beats_defaults_environment_beats_toml_flags_beat_all(tmp_path: Path) -> None:
    toml = 'port = 1\nhost = "a"\ndata = "toml"\n[worker]\nthreads = 1\nmax_rank = 2\n'
    environ = {"OPENMINT_HOST": "b", "OPENMINT_DATA": "env", "OPENMINT_WORKER_THREADS": "3"}
    found = settings_of(tmp_path, toml, environ, data=Path("flag"), port=None)
    assert (found.port, found.host, found.data) == (1, "b", Path("flag"))
    assert (found.worker.threads, found.worker.max_rank) == (3, 2)
    assert found.worker.dtype == WorkerConfig().dtype
    assert found.service == ServiceConfig()


def test_every_type_is_read_from_the_environment() -> None:
    environ = {
        "OPENMINT_PORT": "80",
        "OPENMINT_BASES": "a,b",
        "OPENMINT_DATA": "/d",
        "OPENMINT_SERVICE_LONG_POLL_SECONDS": "2.5",
        "OPENMINT_SERVICE_MAX_BODY_BYTES": "7",
        "OPENMINT_WORKER_DTYPE": "float32",
        "UNRELATED": "x",
    }
    found = load_settings(environ=environ)
    assert (found.port, found.bases, found.data) == (80, ("a", "b"), Path("/d"))
    assert (found.service.long_poll_seconds, found.service.max_body_bytes) == (2.5, 7)
    assert found.worker.dtype == "float32"


def test_a_whole_number_is_fine_where_seconds_are_meant(tmp_path: Path) -> None:
    found = settings_of(tmp_path, "[service]\nlong_poll_seconds = 2\n", {})
    assert found.service.long_poll_seconds == 2.0
    assert isinstance(found.service.long_poll_seconds, float)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("prot = 1", "unknown setting 'prot'; known: .*port"),
        ("[worker]\nthreds = 1", r"unknown setting 'worker\.threds'; known: .*threads"),
        ("[service]\nport = 1", r"unknown setting 'service\.port'"),
        ("[gateway]\nport = 1", "unknown setting 'gateway'"),
        ('port = "many"', "setting port must be a int, got 'many'"),
        ("port = 80.5", "setting port must be a int, got 80.5"),
        ("port = true", "setting port must be a int, got True"),
        ("port = []", "setting port must be a int"),
        ("host = 5", "setting host must be a str, got 5"),
        ("data = 5", "setting data must be a "),
        ("bases = 5", "setting bases must be a tuple"),
        ("bases = [1, 2]", "setting bases must be a tuple"),
        ("worker = 5", "setting worker must be a section"),
        ("[service]\nlong_poll_seconds = 'x'", r"setting service\.long_poll_seconds must be a fl"),
        ("[service]\nlong_poll_seconds = nan", r"service\.long_poll_seconds must be a float"),
        ("port = ", "openmint.toml is not valid TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        settings_of(tmp_path, toml, {})


def test_mistakes_elsewhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="OPENMINT_WORKER_THREADS must be a int, got 'four'"):
        load_settings(environ={"OPENMINT_WORKER_THREADS": "four"})
    with pytest.raises(InvalidRequest, match="unknown setting 'prot'"):
        load_settings(environ={}, flags={"prot": 1})
    with pytest.raises(InvalidRequest, match=r"nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml", {})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("page_tokens", 0, "worker.page_tokens must be at least 1, got 0"),
        ("step_tokens", 0, "worker.step_tokens must be at least 1"),
        ("running_sequences", -1, "worker.running_sequences must be at least 1"),
        ("micro_batch_tokens", 0, "worker.micro_batch_tokens must be at least 1"),
        ("max_rank", 0, "worker.max_rank must be at least 1"),
        ("threads", -1, "worker.threads must be at least 0"),
    ],
)
def test_sizes_that_nothing_could_run_with_are_refused(name: str, value: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_settings(environ={f"OPENMINT_WORKER_{name.upper()}": str(value)})


@pytest.mark.parametrize("section", [WorkerConfig, ServiceConfig, Settings])
def test_every_setting_says_what_it_is_for(section: type) -> None:
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    documented = set()
    for line, following in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and is_text:
            documented.add(line.target.id)
    sections = {"worker", "service"} if section is Settings else set()
    assert documented == {field.name for field in fields(section)} - sections
    assert inspect.getdoc(config)
