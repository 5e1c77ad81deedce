"""`openmint tokenizer`: lay a base's tokenizer where offline clients find it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openmint.cli.output import console
from openmint.cli.remote import DEFAULT_DATA, DataOption
from openmint.models.embedded import (
    EMBEDDED_BASE,
    hub_cache,
    install_client_files,
    install_into_hub_cache,
    resolve_base,
)

app = typer.Typer(
    help="Tokenizers for clients that have no model hub; set HF_HUB_OFFLINE=1 there.",
    no_args_is_help=True,
)
BaseOption = Annotated[str, typer.Option("--base", help="The embedded name, or a folder.")]


@app.command()
def export(
    to: Annotated[Path, typer.Argument(help="Working folder of the client.")],
    base: BaseOption = EMBEDDED_BASE,
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Write TO/<base name>/, which `AutoTokenizer.from_pretrained(<name>)` finds when run in TO."""
    directory = resolve_base(base, data)
    console.print(str(install_client_files(directory, _name(base, directory), to)))


@app.command()
def install(base: BaseOption = EMBEDDED_BASE, data: DataOption = DEFAULT_DATA) -> None:
    """Fill this user's Hugging Face cache, so that clients find the tokenizer from any folder."""
    directory = resolve_base(base, data)
    name = _name(base, directory)
    snapshot = install_into_hub_cache(directory, name, hub_cache())
    console.print(str(snapshot) if snapshot else f"{name} is in the cache already; left as it is")


def _name(base: str, directory: Path) -> str:
    return base if base == EMBEDDED_BASE else directory.name
