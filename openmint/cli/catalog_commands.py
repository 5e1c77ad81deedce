"""Policies, revisions, aliases, evaluation, promotion: the catalogue of a running server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from openmint.catalog.address import PolicyAddress
from openmint.cli.output import JsonFlag, YesFlag, confirm, console, fail, progress, show
from openmint.cli.remote import (
    DEFAULT_DATA,
    DEFAULT_URL,
    DataOption,
    KeyOption,
    UrlOption,
    connect,
)
from openmint.errors import InvalidRequest

policies = typer.Typer(help="Policies: what is trained and served.", no_args_is_help=True)
revisions = typer.Typer(help="Revisions: immutable adapters of a policy.", no_args_is_help=True)
aliases = typer.Typer(help="Aliases: movable names of revisions.", no_args_is_help=True)

PolicyArgument = Annotated[str, typer.Argument(metavar="TENANT/POLICY")]
LimitOption = Annotated[int, typer.Option(help="At most this many.", min=1)]
AliasOption = Annotated[str, typer.Option("--alias", help="Name to move.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the history.")]
OverrideOption = Annotated[
    str | None, typer.Option(help="Why it may pass gates that it fails; kept in the history.")
]
IfVersionOption = Annotated[
    int | None, typer.Option(help="Only if the alias is still at this version.")
]

POLICY_COLUMNS = ("policy", "base_name", "created_at")
REVISION_COLUMNS = (
    "number", "digest", "num_optim_steps", "rank", "alpha", "size_bytes", "origin", "created_at",
)  # fmt: skip
POLL_SECONDS = 0.5
ALIAS_COLUMNS = ("name", "digest", "version", "canary", "updated_at")
EVENT_COLUMNS = (
    "event_id", "action", "from_digest", "to_digest", "share", "actor", "reason",
    "override_reason", "created_at",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.add_typer(policies, name="policies")
    app.add_typer(revisions, name="revisions")
    app.add_typer(aliases, name="aliases")
    app.command()(evaluate)
    app.command()(promote)
    app.command()(rollback)
    app.command()(prewarm)


@policies.command("ls")
def list_policies(
    limit: LimitOption = 100,
    search: Annotated[str | None, typer.Option(help="Only names that contain this.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Another tenant's (admin keys).")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """The tenant's policies."""
    with connect(url, key, data) as remote:
        items = remote.take("/catalog/v1/policies", limit, search=search, tenant=tenant)
    show(items, as_json=as_json, columns=POLICY_COLUMNS)


@policies.command("show")
def show_policy(
    policy: PolicyArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """One policy with its aliases."""
    with connect(url, key, data) as remote:
        show(remote.get(policy_path(policy)), as_json=as_json)


@revisions.command("ls")
def list_revisions(
    policy: PolicyArgument,
    limit: LimitOption = 100,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Unnamed saves of training too.")
    ] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """The revisions of a policy, newest first."""
    with connect(url, key, data) as remote:
        items = remote.take(f"{policy_path(policy)}/revisions", limit, ephemeral=ephemeral)
    show(items, as_json=as_json, columns=REVISION_COLUMNS)


@revisions.command("show")
def show_revision(
    revision: Annotated[str, typer.Argument(metavar="TENANT/POLICY[@ALIAS|@sha256:…]")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """One revision: digest, base, rank, parent, optimizer steps, evaluations."""
    with connect(url, key, data) as remote:
        show(remote.get(revision_path(revision)), as_json=as_json)


@aliases.command("ls")
def list_aliases(
    policy: PolicyArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """The aliases of a policy and what they name now."""
    with connect(url, key, data) as remote:
        items = remote.get(f"{policy_path(policy)}/aliases")["items"]
    show(items, as_json=as_json, columns=ALIAS_COLUMNS)


@aliases.command("history")
def alias_history(
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    limit: LimitOption = 100,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Every move of an alias, newest first."""
    with connect(url, key, data) as remote:
        path = f"{policy_path(policy)}/aliases/{alias}/history"
        items = remote.take(path, limit)
    show(items, as_json=as_json, columns=EVENT_COLUMNS)


def evaluate(
    model: Annotated[str, typer.Argument(help="A base, tenant/policy, …@alias or …@sha256:…")],
    task: Annotated[
        str, typer.Option("--task", help="Task file (JSON), or name or digest of a stored task.")
    ],
    n: Annotated[int | None, typer.Option("--n", help="Only the first n items.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Score a model on a task; the result is stored with the revision, task digest, seed and n."""
    body = {
        "model": model,
        "task": _read_json(Path(task)) if Path(task).is_file() else task,
        "n": n,
        "seed": seed,
        "temperature": temperature,
    }
    with connect(url, key, data) as remote, progress(f"evaluating {model}") as bar:
        result = remote.post("/catalog/v1/evaluations", body)
        while result["status"] == "running":
            time.sleep(POLL_SECONDS)
            result = remote.get(f"/catalog/v1/evaluations/{result['evaluation_id']}")
            done = result.get("progress", {}).get("num_done", 0)
            bar.update(bar.task_ids[0], completed=done, total=result["n"])
    show(result, as_json=as_json)
    if result["status"] != "finished":
        fail(f"the evaluation {result['status']}: {result['error']}")


def promote(
    revision: Annotated[str, typer.Argument(metavar="TENANT/POLICY@sha256:…|@ALIAS")],
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    override: OverrideOption = None,
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Point an alias at a revision that passes its gates; the next request is answered by it."""
    address = PolicyAddress.parse(revision)
    target = address.alias or address.digest_prefix
    if target is None:
        raise InvalidRequest(f"say which revision: {revision}@sha256:… or {revision}@latest")
    policy = f"{address.tenant}/{address.policy}"
    confirm(f"Point {policy}@{alias} at {target}?", yes=yes)
    with connect(url, key, data) as remote:
        path = f"{policy_path(policy)}/aliases/{alias}/promote"
        body = {"revision": target, "reason": reason, "override_reason": override}
        moved = remote.post(path, body, if_match=if_version)
    show_move(policy, moved, as_json=as_json)


def rollback(
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Undo an alias's last change: abort its canary, else point it back at what it named before."""
    path = f"{policy_path(policy)}/aliases/{alias}/rollback"
    confirm(f"Roll {policy}@{alias} back?", yes=yes)
    with connect(url, key, data) as remote:
        moved = remote.post(path, {"reason": reason}, if_match=if_version)
    show_move(policy, moved, as_json=as_json)


def prewarm(
    models: Annotated[list[str], typer.Argument(help="tenant/policy[@alias|@digest], several.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Have revisions read into memory before they are asked for."""
    with connect(url, key, data) as remote:
        found = remote.post("/catalog/v1/prewarm", {"models": models})["items"]
    if as_json:
        show(found, as_json=True)
    else:
        for item in found:
            console.print(f"{item['model']} is {item['digest']}, in memory")


def policy_path(policy: str) -> str:
    """The route of `tenant/policy`. Raises InvalidRequest when it isn't one."""
    address = PolicyAddress.parse(policy)
    if address.alias or address.digest_prefix:
        raise InvalidRequest(f"{policy!r} names a revision; give tenant/policy alone")
    return f"/catalog/v1/policies/{address.tenant}/{address.policy}"


def revision_path(revision: str) -> str:
    """The route of `tenant/policy[@alias|@digest]`; without either, of the served revision."""
    address = PolicyAddress.parse(revision)
    which = address.alias or address.digest_prefix or "default"
    return f"{policy_path(f'{address.tenant}/{address.policy}')}/revisions/{which}"


def show_move(policy: str, moved: Any, *, as_json: bool) -> None:
    """What an alias names after a command moved it."""
    if as_json:
        show(moved, as_json=True)
    else:
        console.print(f"{policy}@{moved['name']} is {moved['digest']} (version {moved['version']})")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from None
