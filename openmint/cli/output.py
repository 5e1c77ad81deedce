"""What commands print: tables for people, one JSON document for scripts, errors on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from openmint import errors

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_CONFLICT = 1, 2, 3, 4
EXIT_CODES: dict[type[errors.OpenMintError], int] = {
    errors.NotFound: EXIT_NOT_FOUND,
    errors.Gone: EXIT_NOT_FOUND,
    errors.Conflict: EXIT_CONFLICT,
    errors.BodyMismatch: EXIT_CONFLICT,
    errors.InvalidRequest: EXIT_USAGE,
}

console = Console(highlight=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
YesFlag = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before changing anything.")]


def exit_code_of(error: errors.OpenMintError) -> int:
    """The exit code of a failure: 2 usage, 3 not found, 4 conflict, else 1."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), 1)


def fail(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """Say what went wrong on stderr and leave with this exit code."""
    err_console.print(f"[red]error:[/red] {_plain(message)}")
    raise typer.Exit(code)


def show(value: Any, *, as_json: bool, columns: Sequence[str] = ()) -> None:
    """Print a record or a list of records. `columns` are the fields of the table, in order."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, default=_jsonable) + "\n")
    elif isinstance(value, Sequence):
        _print_table([to_mapping(item) for item in value], columns)
    else:
        _print_record(to_mapping(value))


def to_mapping(item: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    assert isinstance(item, Mapping)
    return item


def confirm(question: str, *, yes: bool) -> None:
    """Go on only when the user agrees. Without a terminal the answer is `--yes` or exit 2."""
    if yes:
        return
    if not sys.stdin.isatty():
        fail(f"{question} Repeat with --yes to do it without being asked.", EXIT_USAGE)
    if not typer.confirm(question):
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def progress(text: str) -> Iterator[Progress]:
    """A progress display on stderr, only on a terminal; gone when the work is done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
    )
    hidden = not err_console.is_terminal
    with Progress(*columns, console=err_console, transient=True, disable=hidden) as bar:
        bar.add_task(text, total=None)
        yield bar


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    if not rows:
        err_console.print("nothing to show")
        return
    if not console.is_terminal:
        for row in rows:
            sys.stdout.write("\t".join(_text(row.get(name)) for name in columns) + "\n")
        return
    table = Table(*(name.replace("_", " ") for name in columns), header_style="bold", box=None)
    for row in rows:
        table.add_row(*(_plain(_short(_text(row.get(name)))) for name in columns))
    console.print(table)


def _print_record(record: Mapping[str, Any]) -> None:
    width = max(len(name) for name in record)
    for name, value in record.items():
        console.print(f"[dim]{name:<{width}}[/dim]  {_plain(_text(value))}")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=_jsonable)
    # Names may come from a client: control characters must not reach a terminal.
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _short(text: str) -> str:
    """A digest as its first 12 digits; enough to tell apart, and `--json` has it whole."""
    return text[:19] + "…" if text.startswith("sha256:") else text


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)
