"""What tenants may use and what they used, on a running server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from openmint.cli.output import JsonFlag, console, show
from openmint.cli.remote import Remote, with_remote

quota = typer.Typer(help="Quotas: what a tenant may use.", no_args_is_help=True)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
USAGE_COLUMNS = (
    "hour", "tenant", "base_name", "trained_tokens", "prompt_tokens", "cached_tokens",
    "sampled_tokens", "checkpoints", "engine_seconds",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.add_typer(quota, name="quota")
    app.command()(usage)


@with_remote
def usage(
    remote: Remote,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's (admin keys).")] = None,
    days: Annotated[float, typer.Option(help="How far back.", min=0.0, max=3660.0)] = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Tokens, saves and engine seconds by hour and base; with an admin key, of every tenant."""
    since = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    found = remote.get("/catalog/v1/usage", tenant=tenant, since=since)
    show(found["items"], as_json=as_json, columns=USAGE_COLUMNS)


@quota.command("show")
@with_remote
def show_quota(
    remote: Remote,
    tenant: TenantArgument,
    as_json: JsonFlag = False,
) -> None:
    """What the tenant may use: its own quota, else the default."""
    show(remote.get(f"/catalog/v1/tenants/{tenant}/quota"), as_json=as_json)


@quota.command("set")
@with_remote
def set_quota(
    remote: Remote,
    tenant: TenantArgument,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests a minute.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens a minute: trained, read and generated.")
    ] = None,
    resident_adapters: Annotated[
        int | None, typer.Option(help="Live runs and sampled revisions at one time.")
    ] = None,
    stored_bytes: Annotated[
        int | None, typer.Option(help="Bytes of checkpoints and revisions.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Give the tenant a quota of its own; what is left out is without limit."""
    body = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "resident_adapters": resident_adapters,
        "stored_bytes": stored_bytes,
    }
    show(remote.send("PUT", f"/catalog/v1/tenants/{tenant}/quota", json=body), as_json=as_json)


@quota.command("clear")
@with_remote
def clear_quota(
    remote: Remote,
    tenant: TenantArgument,
) -> None:
    """Give the tenant the default quota again."""
    remote.send("DELETE", f"/catalog/v1/tenants/{tenant}/quota")
    console.print(f"{tenant} has the default quota")
