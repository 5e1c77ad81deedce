"""Policies, revisions, aliases, evaluation, promotion: the catalogue of a running server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from openmint.catalog.address import NAME, PolicyAddress
from openmint.cli.output import JsonFlag, YesFlag, confirm, console, fail, progress, show
from openmint.cli.remote import Remote, with_remote
from openmint.errors import InvalidRequest

policies = typer.Typer(help="Policies: what is trained and served.", no_args_is_help=True)
revisions = typer.Typer(help="Revisions: immutable adapters of a policy.", no_args_is_help=True)
aliases = typer.Typer(help="Aliases: movable names of revisions.", no_args_is_help=True)

PolicyArgument = Annotated[str, typer.Argument(metavar="TENANT/POLICY")]
LimitOption = Annotated[int, typer.Option(help="At most this many.", min=1)]
AliasOption = Annotated[str, typer.Option("--alias", help="Name to move.")]
PinnedOption = Annotated[str, typer.Option("--alias", help="What it names stays in memory.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the history.")]
OverrideOption = Annotated[
    str | None, typer.Option(help="Why it may pass gates that it fails; kept in the history.")
]
IfVersionOption = Annotated[
    int | None, typer.Option(help="Only if the alias is still at this version.")
]

PrefixOption = Annotated[
    str | None, typer.Option("--prefix", help="Only policies whose name begins so.")
]
TagOption = Annotated[str | None, typer.Option("--tag", help="Only with this tag.")]
OwnerOption = Annotated[
    str | None, typer.Option("--owner", help="Only what this session or key made.")
]
BaseOption = Annotated[str | None, typer.Option("--base", help="Only of this base.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="Only with a score on this evaluation task.")
]
ScoreOption = Annotated[
    float | None, typer.Option("--min-score", help="The least score on the task.")
]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", help="Another tenant's (admin keys).")
]
ThingArgument = Annotated[str, typer.Argument(metavar="TENANT/POLICY[@ALIAS|@sha256:…]")]

POLICY_COLUMNS = ("policy", "base_name", "created_at")
REVISION_COLUMNS = (
    "number", "digest", "num_optim_steps", "rank", "alpha", "size_bytes", "origin", "created_at",
)  # fmt: skip
POLL_SECONDS = 0.5
PIN_COLUMNS = ("pinned", "digest", "state", "num_bytes")
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
    app.command()(pin)
    app.command()(unpin)
    app.command("pins")(list_pins)
    app.command()(tag)
    app.command()(untag)
    app.command()(gc)


@policies.command("ls")
@with_remote
def list_policies(
    remote: Remote,
    limit: LimitOption = 100,
    search: Annotated[str | None, typer.Option(help="Only names that contain this.")] = None,
    prefix: PrefixOption = None,
    tag: TagOption = None,
    owner: OwnerOption = None,
    base: BaseOption = None,
    task: TaskOption = None,
    min_score: ScoreOption = None,
    tenant: TenantOption = None,
    as_json: JsonFlag = False,
) -> None:
    """The tenant's policies by name; with a task, the best score first."""
    wanted = {
        "search": search, "prefix": prefix, "tag": tag, "owner": owner, "base": base, "task": task,
        "min_score": min_score, "tenant": tenant,
    }  # fmt: skip
    items = remote.take("/catalog/v1/policies", limit, **wanted)
    show(items, as_json=as_json, columns=POLICY_COLUMNS)


@policies.command("show")
@with_remote
def show_policy(
    remote: Remote,
    policy: PolicyArgument,
    as_json: JsonFlag = False,
) -> None:
    """One policy with its aliases."""
    show(remote.get(policy_path(policy)), as_json=as_json)


@policies.command("retention")
@with_remote
def retention(
    remote: Remote,
    policy: PolicyArgument,
    keep: Annotated[
        int | None, typer.Option("--keep", help="Keep so many of its newest revisions.", min=1)
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Keep what the service's settings say.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """What a policy keeps and what would be deleted now; with --keep or --clear, change it."""
    if clear and keep is not None:
        raise InvalidRequest("give --keep or --clear, not both")
    path = f"{policy_path(policy)}/retention"
    changes = clear or keep is not None
    plan = remote.send("PUT", path, json={"keep_revisions": keep}) if changes else None
    plan = plan or remote.get(path)
    if as_json:
        show(plan, as_json=True)
        return
    kept = plan["keep_revisions"] or "all"
    console.print(f"{policy} keeps {kept} revisions and {plan['keep_rollbacks']} rollbacks a name")
    show(plan["surplus"], as_json=False, columns=REVISION_COLUMNS)


@revisions.command("ls")
@with_remote
def list_revisions(
    remote: Remote,
    policy: PolicyArgument,
    limit: LimitOption = 100,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Unnamed saves of training too.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """The revisions of a policy, newest first."""
    items = remote.take(f"{policy_path(policy)}/revisions", limit, ephemeral=ephemeral)
    show(items, as_json=as_json, columns=REVISION_COLUMNS)


@revisions.command("find")
@with_remote
def find_revisions(
    remote: Remote,
    limit: LimitOption = 100,
    prefix: PrefixOption = None,
    tag: TagOption = None,
    owner: OwnerOption = None,
    base: BaseOption = None,
    task: TaskOption = None,
    min_score: ScoreOption = None,
    tenant: TenantOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Revisions of all the tenant's policies that all options want; with a task, best first."""
    wanted = {
        "prefix": prefix, "tag": tag, "owner": owner, "base": base, "task": task,
        "min_score": min_score, "tenant": tenant,
    }  # fmt: skip
    items = remote.take("/catalog/v1/revisions", limit, **wanted)
    show(items, as_json=as_json, columns=("policy", *REVISION_COLUMNS))


@revisions.command("show")
@with_remote
def show_revision(
    remote: Remote,
    revision: Annotated[str, typer.Argument(metavar="TENANT/POLICY[@ALIAS|@sha256:…]")],
    as_json: JsonFlag = False,
) -> None:
    """One revision: digest, base, rank, parent, optimizer steps, evaluations."""
    show(remote.get(revision_path(revision)), as_json=as_json)


@revisions.command("lineage")
@with_remote
def show_lineage(
    remote: Remote,
    revision: ThingArgument,
    descendants: Annotated[
        bool, typer.Option("--descendants", help="What came of it, not what it came of.")
    ] = False,
    depth: Annotated[int, typer.Option(help="At most so many steps away.", min=1, max=1000)] = 100,
    as_json: JsonFlag = False,
) -> None:
    """A revision and its ancestors, or its descendants, nearest first."""
    what = "descendants" if descendants else "lineage"
    items = remote.get(f"{revision_path(revision)}/{what}", depth=depth)["items"]
    show(items, as_json=as_json, columns=("distance", *REVISION_COLUMNS))


@aliases.command("ls")
@with_remote
def list_aliases(
    remote: Remote,
    policy: PolicyArgument,
    as_json: JsonFlag = False,
) -> None:
    """The aliases of a policy and what they name now."""
    items = remote.get(f"{policy_path(policy)}/aliases")["items"]
    show(items, as_json=as_json, columns=ALIAS_COLUMNS)


@aliases.command("history")
@with_remote
def alias_history(
    remote: Remote,
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    limit: LimitOption = 100,
    as_json: JsonFlag = False,
) -> None:
    """Every move of an alias, newest first."""
    path = f"{policy_path(policy)}/aliases/{alias}/history"
    items = remote.take(path, limit)
    show(items, as_json=as_json, columns=EVENT_COLUMNS)


@with_remote
def evaluate(
    remote: Remote,
    model: Annotated[str, typer.Argument(help="A base, tenant/policy, …@alias or …@sha256:…")],
    task: Annotated[
        str, typer.Option("--task", help="Task file (JSON), or name or digest of a stored task.")
    ],
    n: Annotated[int | None, typer.Option("--n", help="Only the first n items.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
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
    with progress(f"evaluating {model}") as bar:
        result = remote.post("/catalog/v1/evaluations", body)
        while result["status"] == "running":
            time.sleep(POLL_SECONDS)
            result = remote.get(f"/catalog/v1/evaluations/{result['evaluation_id']}")
            done = result.get("progress", {}).get("num_done", 0)
            bar.update(bar.task_ids[0], completed=done, total=result["n"])
    show(result, as_json=as_json)
    if result["status"] != "finished":
        fail(f"the evaluation {result['status']}: {result['error']}")


@with_remote
def promote(
    remote: Remote,
    revision: Annotated[str, typer.Argument(metavar="TENANT/POLICY@sha256:…|@ALIAS")],
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    override: OverrideOption = None,
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Point an alias at a revision that passes its gates; the next request is answered by it."""
    address = PolicyAddress.parse(revision)
    target = address.alias or address.digest_prefix
    if target is None:
        raise InvalidRequest(f"say which revision: {revision}@sha256:… or {revision}@latest")
    policy = f"{address.tenant}/{address.policy}"
    confirm(f"Point {policy}@{alias} at {target}?", yes=yes)
    path = f"{policy_path(policy)}/aliases/{alias}/promote"
    body = {"revision": target, "reason": reason, "override_reason": override}
    moved = remote.post(path, body, if_match=if_version)
    show_move(policy, moved, as_json=as_json)


@with_remote
def rollback(
    remote: Remote,
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Undo an alias's last change: abort its canary, else point it back at what it named before."""
    path = f"{policy_path(policy)}/aliases/{alias}/rollback"
    confirm(f"Roll {policy}@{alias} back?", yes=yes)
    moved = remote.post(path, {"reason": reason}, if_match=if_version)
    show_move(policy, moved, as_json=as_json)


@with_remote
def prewarm(
    remote: Remote,
    models: Annotated[list[str], typer.Argument(help="tenant/policy[@alias|@digest], several.")],
    as_json: JsonFlag = False,
) -> None:
    """Have revisions read into memory before they are asked for."""
    found = remote.post("/catalog/v1/prewarm", {"models": models})["items"]
    if as_json:
        show(found, as_json=True)
    else:
        for item in found:
            console.print(f"{item['model']} is {item['digest']}, in memory")


@with_remote
def pin(
    remote: Remote,
    policy: PolicyArgument,
    alias: PinnedOption = "prod",
    as_json: JsonFlag = False,
) -> None:
    """Keep what an alias names in memory from now on, also after its moves and after restarts."""
    pinned = remote.put(f"{policy_path(policy)}/aliases/{alias}/pin", {})
    show(pinned if as_json else _rows_of(pinned), as_json=as_json, columns=PIN_COLUMNS)


@with_remote
def unpin(
    remote: Remote,
    policy: PolicyArgument,
    alias: PinnedOption = "prod",
) -> None:
    """Let what an alias names leave memory like any other."""
    remote.send("DELETE", f"{policy_path(policy)}/aliases/{alias}/pin")


@with_remote
def list_pins(
    remote: Remote,
    tenant: TenantOption = None,
    as_json: JsonFlag = False,
) -> None:
    """The pinned aliases, and whether what they name is in memory."""
    items = remote.get("/catalog/v1/pins", tenant=tenant)["items"]
    rows = [row for item in items for row in _rows_of(item)]
    show(items if as_json else rows, as_json=as_json, columns=PIN_COLUMNS)


@with_remote
def tag(
    remote: Remote,
    thing: ThingArgument,
    word: Annotated[str, typer.Argument(metavar="TAG")],
) -> None:
    """Tag a policy or a revision, to find it again with --tag."""
    remote.send("PUT", _tag_path(thing, word))


@with_remote
def untag(
    remote: Remote,
    thing: ThingArgument,
    word: Annotated[str, typer.Argument(metavar="TAG")],
) -> None:
    """Take a tag from a policy or a revision."""
    remote.send("DELETE", _tag_path(thing, word))


@with_remote
def gc(
    remote: Remote,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=1000)] = 100,
    as_json: JsonFlag = False,
) -> None:
    """Bytes that no record names, and when the server deletes them; changes nothing."""
    items = remote.get("/catalog/v1/garbage", limit=limit)["items"]
    show(items, as_json=as_json, columns=("digest", "goes_at"))


def _tag_path(thing: str, word: str) -> str:
    """Of the revision when `thing` names one, else of the policy."""
    if not NAME.fullmatch(word):
        raise InvalidRequest(f"a tag matches {NAME.pattern}, got {word!r}")
    place = revision_path(thing) if "@" in thing else policy_path(thing)
    return f"{place}/tags/{word}"


def _rows_of(pin: Any) -> list[Any]:
    """A row for each revision of a pinned alias."""
    return [
        {"pinned": f"{pin['policy']}@{pin['alias']}", **revision} for revision in pin["revisions"]
    ]


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
