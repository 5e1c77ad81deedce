"""`openmint import`, `import-all` and `export`: PEFT folders in and out, merged models out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Annotated, Any

import typer

from openmint.cli.archives import batches, peft_folders
from openmint.cli.catalog_commands import policy_path, revision_path
from openmint.cli.output import JsonFlag, console, err_console, fail, progress, show
from openmint.cli.remote import Remote, check, with_remote
from openmint.errors import InvalidRequest, UnsupportedFormat
from openmint.models.embedded import EMBEDDED_BASE, resolve_base

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def register(app: typer.Typer) -> None:
    app.command("import")(import_adapter)
    app.command("import-all")(import_all)
    app.command("export")(export_revision)


@with_remote
def import_adapter(
    remote: Remote,
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, metavar="PEFT_FOLDER")],
    policy: Annotated[str, typer.Option("--policy", metavar="TENANT/POLICY", help="Its policy.")],
    base: Annotated[
        str, typer.Option("--base", help="Resident base that it was trained on.")
    ] = EMBEDDED_BASE,
    as_json: JsonFlag = False,
) -> None:
    """Add a PEFT adapter as a revision of a policy; refused with the list of what doesn't fit."""
    weights = _weights_in(directory)
    config = directory / CONFIG_FILE
    if not config.is_file():
        raise InvalidRequest(f"{directory} holds no {CONFIG_FILE}; it isn't a PEFT folder")
    files = {
        "config": (CONFIG_FILE, config.read_bytes(), "application/json"),
        "weights": (WEIGHTS_FILE, weights.read_bytes(), "application/octet-stream"),
    }
    with progress(f"importing {directory.name}"):
        path = f"{policy_path(policy)}/revisions"
        added = remote.send("POST", path, files=files, data={"base": base})
    show(added, as_json=as_json)


@with_remote
def import_all(
    remote: Remote,
    source: Annotated[
        Path, typer.Argument(exists=True, metavar="FOLDER_OR_TAR", help="Holds the adapters.")
    ],
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose they become; else the key's tenant.")
    ] = None,
    base: Annotated[
        str, typer.Option("--base", help="Resident base that they were trained on.")
    ] = EMBEDDED_BASE,
    as_json: JsonFlag = False,
) -> None:
    """Add many PEFT adapters: folders POLICY, or POLICY/NAME for several of one policy.

    Those that don't fit are listed and the others recorded; repeating it is safe.
    """
    done: list[dict[str, Any]] = []
    params = {"base": base} | ({"tenant": tenant} if tenant else {})
    with progress(f"importing {source.name}") as bar:
        for batch in batches(peft_folders(source)):
            done += remote.send(
                "POST",
                "/catalog/v1/imports",
                params=params,
                content=batch,
                headers={"Content-Type": "application/x-tar"},
            )["items"]
            bar.update(bar.task_ids[0], completed=len(done))
    _show_imports(done, as_json=as_json)


def _show_imports(done: list[dict[str, Any]], *, as_json: bool) -> None:
    refused = [item for item in done if item["error"]]
    if as_json:
        show(done, as_json=True)
    else:
        console.print(f"{len(done) - len(refused)} of {len(done)} adapters are revisions now")
        for item in refused:
            err_console.print(f"{item['path']}: {item['error']}", markup=False)
    if refused:
        fail(f"{len(refused)} of {len(done)} adapters were refused")


@with_remote
def export_revision(
    remote: Remote,
    revision: Annotated[str, typer.Argument(metavar="TENANT/POLICY[@ALIAS|@sha256:…]")],
    directory: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="A whole Hugging Face model with the adapter inside.")
    ] = False,
    base: Annotated[
        str, typer.Option("--base", help="Folder of the base for --merged; else as the server's.")
    ] = "",
) -> None:
    """Write a revision as a PEFT folder, or merged into its base as an ordinary model."""
    if directory.exists():
        raise InvalidRequest(f"{directory} exists already; give a folder that doesn't")
    with progress(f"exporting {revision}"):
        files = download(remote, revision)
        if merged:
            name = base or remote.get(revision_path(revision))["base_name"]
            _write_merged(files, resolve_base(name, remote.data), directory)
        else:
            _write_files(files, directory)
    console.print(str(directory))


def download(remote: Remote, revision: str) -> dict[str, bytes]:
    """The files of the revision's PEFT folder."""
    response = remote.client.get(f"{revision_path(revision)}/peft")
    check(response)
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        members = {name: archive.extractfile(name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        return {name: member.read() for name, member in members.items() if member}


def _write_files(files: dict[str, bytes], directory: Path) -> None:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _write_merged(files: dict[str, bytes], base: Path, directory: Path) -> None:
    # torch takes seconds to load, and nothing else in the command line needs it.
    from safetensors.torch import load

    from openmint.models.merge import merge_into_folder

    config = json.loads(files[CONFIG_FILE])
    scaling = config["lora_alpha"] / config["r"]
    merge_into_folder(base, load(files[WEIGHTS_FILE]), scaling, directory)


def _weights_in(directory: Path) -> Path:
    """The adapter's safetensors file. Raises UnsupportedFormat for a pickle."""
    path = directory / WEIGHTS_FILE
    if path.is_file():
        return path
    if pickles := sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt")):
        raise UnsupportedFormat(
            f"{pickles[0].name} is a pickle, which can run code when read; save the adapter again "
            "with safe_serialization=True"
        )
    raise InvalidRequest(f"{directory} holds no {WEIGHTS_FILE}")
