"""The `openmint` command: its tree of subcommands and what their failures exit with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from openmint import __version__, errors
from openmint.cli import (
    backup,
    catalog_commands,
    chat,
    doctor,
    journal,
    keys,
    plan,
    residency,
    tenants,
    tokenizer,
    traffic,
    transfer,
)
from openmint.cli.output import err_console, exit_code_of
from openmint.cli.remote import ConfigOption
from openmint.config import load_settings

app = typer.Typer(
    name="openmint",
    help="Train and serve many LoRA policies over a few resident base models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(keys.app, name="keys")
app.add_typer(journal.app, name="journal")
app.add_typer(tokenizer.app, name="tokenizer")
backup.register(app)
catalog_commands.register(app)
chat.register(app)
plan.register(app)
residency.register(app)
tenants.register(app)
traffic.register(app)
transfer.register(app)
doctor.register(app)


def main() -> None:
    """Run the command line; exit 0 done, 1 failed, 2 usage, 3 not found, 4 conflict."""
    try:
        app()
    except errors.OpenMintError as error:
        err_console.print("error:", error.message, style=None, markup=False)
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"openmint {__version__}\n")
        raise typer.Exit


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of everything durable.")] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="Base to keep resident: the embedded name or a folder. Repeatable."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Start the service: Tinker API, OpenAI API and catalogue on one port."""
    from openmint.cli import (
        serve as serving,
    )  # loads the web stack, which other commands don't need

    flags = {"host": host, "port": port, "data": data, "bases": tuple(base) if base else None}
    serving.serve(load_settings(config, flags=flags))
