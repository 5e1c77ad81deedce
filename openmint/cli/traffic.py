"""What stands between training and traffic, on a running server: gates of aliases."""

from __future__ import annotations

from typing import Annotated

import typer

from openmint.cli.catalog_commands import AliasOption, PolicyArgument, policy_path
from openmint.cli.output import JsonFlag, show
from openmint.cli.remote import (
    DEFAULT_DATA,
    DEFAULT_URL,
    DataOption,
    KeyOption,
    UrlOption,
    connect,
)

gate = typer.Typer(
    help="Gates: what a revision must show before an alias may name it.", no_args_is_help=True
)

ConfidenceOption = Annotated[float, typer.Option(help="Of the comparison, one-sided.")]
GATE_COLUMNS = (
    "gate_id", "task_name", "task_digest", "num_items", "min_score", "margin", "confidence",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.add_typer(gate, name="gate")


@gate.command("list")
def list_gates(
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """The gates of an alias."""
    with connect(url, key, data) as remote:
        items = remote.get(f"{_alias_path(policy, alias)}/gates")["items"]
    show(items, as_json=as_json, columns=GATE_COLUMNS)


@gate.command("add")
def add_gate(
    policy: PolicyArgument,
    task: Annotated[
        str, typer.Option("--task", help="Name (its newest task counts) or digest of a task.")
    ],
    alias: AliasOption = "prod",
    min_score: Annotated[float | None, typer.Option(help="Score to reach, 0 to 1.")] = None,
    margin: Annotated[
        float | None, typer.Option(help="How far below what the alias names it may be, 0 to 1.")
    ] = None,
    confidence: ConfidenceOption = 0.95,
    n: Annotated[
        int | None, typer.Option("--n", help="Items that must be asked at least; else all.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Let an alias move only to revisions that reach a score, or are not much worse than now."""
    body = {
        "task": task,
        "min_score": min_score,
        "margin": margin,
        "confidence": confidence,
        "n": n,
    }
    with connect(url, key, data) as remote:
        show(remote.post(f"{_alias_path(policy, alias)}/gates", body), as_json=as_json)


@gate.command("remove")
def remove_gate(
    policy: PolicyArgument,
    gate_id: Annotated[int, typer.Argument(metavar="GATE_ID")],
    alias: AliasOption = "prod",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Let an alias move without this gate."""
    with connect(url, key, data) as remote:
        remote.send("DELETE", f"{_alias_path(policy, alias)}/gates/{gate_id}")


def _alias_path(policy: str, alias: str) -> str:
    return f"{policy_path(policy)}/aliases/{alias}"
