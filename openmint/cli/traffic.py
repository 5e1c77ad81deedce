"""Between training and traffic, on a running server: gates, canaries, watches, schedules."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from openmint.catalog.address import PolicyAddress
from openmint.cli.catalog_commands import (
    AliasOption,
    IfVersionOption,
    OverrideOption,
    PolicyArgument,
    ReasonOption,
    policy_path,
    show_move,
)
from openmint.cli.output import JsonFlag, YesFlag, confirm, console, show
from openmint.cli.remote import Remote, with_remote
from openmint.errors import InvalidRequest

gate = typer.Typer(
    help="Gates: what a revision must show before an alias may name it.", no_args_is_help=True
)

canary = typer.Typer(
    help="Canaries: a second revision for a share of an alias's traffic.", no_args_is_help=True
)

watch = typer.Typer(
    help="Watches: what answers must show, or a revision loses its traffic.", no_args_is_help=True
)

schedule = typer.Typer(help="Evaluations that start by themselves.", no_args_is_help=True)

ShareOption = Annotated[
    float, typer.Option("--share", help="Part of the traffic, above 0 and below 1.")
]
ConfidenceOption = Annotated[float, typer.Option(help="Of the comparison, one-sided.")]
GATE_COLUMNS = (
    "gate_id", "task_name", "task_digest", "num_items", "min_score", "margin", "confidence",
)  # fmt: skip

WATCH_COLUMNS = (
    "watch_id", "metric", "at_least", "at_most", "confidence", "min_observations",
    "window_seconds", "revisions",
)  # fmt: skip

SCHEDULE_COLUMNS = (
    "schedule_id", "task", "num_items", "every_hours", "last_digest", "next_at",
)  # fmt: skip
FollowedOption = Annotated[str, typer.Option("--alias", help="What it names is evaluated.")]


def register(app: typer.Typer) -> None:
    app.add_typer(gate, name="gate")
    app.add_typer(canary, name="canary")
    app.add_typer(watch, name="watch")
    app.add_typer(schedule, name="schedule")


@gate.command("list")
@with_remote
def list_gates(
    remote: Remote,
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    as_json: JsonFlag = False,
) -> None:
    """The gates of an alias."""
    items = remote.get(f"{_alias_path(policy, alias)}/gates")["items"]
    show(items, as_json=as_json, columns=GATE_COLUMNS)


@gate.command("add")
@with_remote
def add_gate(
    remote: Remote,
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
    show(remote.post(f"{_alias_path(policy, alias)}/gates", body), as_json=as_json)


@gate.command("remove")
@with_remote
def remove_gate(
    remote: Remote,
    policy: PolicyArgument,
    gate_id: Annotated[int, typer.Argument(metavar="GATE_ID")],
    alias: AliasOption = "prod",
) -> None:
    """Let an alias move without this gate."""
    remote.send("DELETE", f"{_alias_path(policy, alias)}/gates/{gate_id}")


@canary.command("start")
@with_remote
def start_canary(
    remote: Remote,
    revision: Annotated[str, typer.Argument(metavar="TENANT/POLICY@sha256:…|@ALIAS")],
    share: ShareOption,
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Give a share of an alias's traffic to a second revision."""
    address = PolicyAddress.parse(revision)
    target = address.alias or address.digest_prefix
    if target is None:
        raise InvalidRequest(f"say which revision: {revision}@sha256:… or {revision}@latest")
    policy = f"{address.tenant}/{address.policy}"
    confirm(f"Give {share:g} of {policy}@{alias} to {target}?", yes=yes)
    body = {"revision": target, "share": share, "reason": reason}
    changed = remote.put(f"{_alias_path(policy, alias)}/canary", body, if_match=if_version)
    _show_canary(policy, changed, as_json=as_json)


@canary.command("share")
@with_remote
def share_canary(
    remote: Remote,
    policy: PolicyArgument,
    share: ShareOption,
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Change the canary's share; raising it moves clients to the canary and none away from it."""
    confirm(f"Give {share:g} of {policy}@{alias} to its canary?", yes=yes)
    body = {"share": share, "reason": reason}
    changed = remote.put(f"{_alias_path(policy, alias)}/canary", body, if_match=if_version)
    _show_canary(policy, changed, as_json=as_json)


@canary.command("finish")
@with_remote
def finish_canary(
    remote: Remote,
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    override: OverrideOption = None,
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Promote the canary, if it passes the alias's gates."""
    confirm(f"Point {policy}@{alias} at its canary?", yes=yes)
    body = {"reason": reason, "override_reason": override}
    path = f"{_alias_path(policy, alias)}/canary/finish"
    moved = remote.post(path, body, if_match=if_version)
    show_move(policy, moved, as_json=as_json)


@canary.command("abort")
@with_remote
def abort_canary(
    remote: Remote,
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    reason: ReasonOption = "",
    if_version: IfVersionOption = None,
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Give all traffic back to what the alias names."""
    confirm(f"Take the canary of {policy}@{alias} away?", yes=yes)
    path = f"{_alias_path(policy, alias)}/canary/abort"
    kept = remote.post(path, {"reason": reason}, if_match=if_version)
    show_move(policy, kept, as_json=as_json)


@watch.command("list")
@with_remote
def list_watches(
    remote: Remote,
    policy: PolicyArgument,
    alias: AliasOption = "prod",
    as_json: JsonFlag = False,
) -> None:
    """The watches of an alias, and what they find now."""
    items = remote.get(f"{_alias_path(policy, alias)}/watches")["items"]
    show(items, as_json=as_json, columns=WATCH_COLUMNS)


@watch.command("add")
@with_remote
def add_watch(
    remote: Remote,
    policy: PolicyArgument,
    metric: Annotated[
        str, typer.Option("--metric", help="A name that clients report, or service.failed.")
    ],
    alias: AliasOption = "prod",
    at_least: Annotated[float | None, typer.Option(help="Least mean, 0 to 1.")] = None,
    at_most: Annotated[float | None, typer.Option(help="Greatest mean, 0 to 1.")] = None,
    confidence: Annotated[float, typer.Option(help="That the mean is worse than that.")] = 0.95,
    min_observations: Annotated[int, typer.Option(help="Fewer decide nothing.", min=1)] = 20,
    window_seconds: Annotated[int, typer.Option(help="How far back.", min=60)] = 3600,
    as_json: JsonFlag = False,
) -> None:
    """Abort a canary, or roll an alias back, when its answers do worse than this."""
    body = {
        "metric": metric,
        "at_least": at_least,
        "at_most": at_most,
        "confidence": confidence,
        "min_observations": min_observations,
        "window_seconds": window_seconds,
    }
    show(remote.post(f"{_alias_path(policy, alias)}/watches", body), as_json=as_json)


@watch.command("remove")
@with_remote
def remove_watch(
    remote: Remote,
    policy: PolicyArgument,
    watch_id: Annotated[int, typer.Argument(metavar="WATCH_ID")],
    alias: AliasOption = "prod",
) -> None:
    """Watch no longer."""
    remote.send("DELETE", f"{_alias_path(policy, alias)}/watches/{watch_id}")


@schedule.command("list")
@with_remote
def list_schedules(
    remote: Remote,
    policy: PolicyArgument,
    alias: FollowedOption = "latest",
    as_json: JsonFlag = False,
) -> None:
    """The schedules of an alias."""
    items = remote.get(f"{_alias_path(policy, alias)}/schedules")["items"]
    show(items, as_json=as_json, columns=SCHEDULE_COLUMNS)


@schedule.command("add")
@with_remote
def add_schedule(
    remote: Remote,
    policy: PolicyArgument,
    task: Annotated[
        str, typer.Option("--task", help="Name (its newest task is asked) or digest of a task.")
    ],
    alias: FollowedOption = "latest",
    every_hours: Annotated[
        float | None, typer.Option(help="So often, instead of for each new revision.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Only the first n items.", min=1)] = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate each revision that is new to an alias, or what it names every so many hours."""
    body = {"task": task, "n": n, "every_hours": every_hours}
    show(remote.post(f"{_alias_path(policy, alias)}/schedules", body), as_json=as_json)


@schedule.command("remove")
@with_remote
def remove_schedule(
    remote: Remote,
    policy: PolicyArgument,
    schedule_id: Annotated[int, typer.Argument(metavar="SCHEDULE_ID")],
    alias: FollowedOption = "latest",
) -> None:
    """Let nothing start by this schedule any more."""
    remote.send("DELETE", f"{_alias_path(policy, alias)}/schedules/{schedule_id}")


def _show_canary(policy: str, alias: Any, *, as_json: bool) -> None:
    if as_json:
        show(alias, as_json=True)
    else:
        share, digest = alias["canary"]["share"], alias["canary"]["digest"]
        console.print(f"{share:g} of {policy}@{alias['name']} is {digest}")


def _alias_path(policy: str, alias: str) -> str:
    return f"{policy_path(policy)}/aliases/{alias}"
