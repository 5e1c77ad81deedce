"""What tenants may use and what they used, on a running server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from openmint.cli.output import JsonFlag, console, show
from openmint.cli.remote import (
    DEFAULT_DATA,
    DEFAULT_URL,
    DataOption,
    KeyOption,
    UrlOption,
    connect,
)

quota = typer.Typer(help="Quotas: what a tenant may use.", no_args_is_help=True)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]
USAGE_COLUMNS = (
    "hour", "tenant", "base_name", "trained_tokens", "prompt_tokens", "cached_tokens",
    "sampled_tokens", "checkpoints", "engine_seconds",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    app.add_typer(quota, name="quota")
    app.command()(usage)


def usage(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's (admin keys).")] = None,
    days: Annotated[float, typer.Option(help="How far back.", min=0.0, max=3660.0)] = 1.0,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Tokens, saves and engine seconds by hour and base; with an admin key, of every tenant."""
    since = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    with connect(url, key, data) as remote:
        found = remote.get("/catalog/v1/usage", tenant=tenant, since=since)
    show(found["items"], as_json=as_json, columns=USAGE_COLUMNS)


@quota.command("show")
def show_quota(
    tenant: TenantArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """What the tenant may use: its own quota, else the default."""
    with connect(url, key, data) as remote:
        show(remote.get(f"/catalog/v1/tenants/{tenant}/quota"), as_json=as_json)


@quota.command("set")
def set_quota(
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
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
    as_json: JsonFlag = False,
) -> None:
    """Give the tenant a quota of its own; what is left out is without limit."""
    body = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "resident_adapters": resident_adapters,
        "stored_bytes": stored_bytes,
    }
    with connect(url, key, data) as remote:
        show(remote.send("PUT", f"/catalog/v1/tenants/{tenant}/quota", json=body), as_json=as_json)


@quota.command("clear")
def clear_quota(
    tenant: TenantArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
    data: DataOption = DEFAULT_DATA,
) -> None:
    """Give the tenant the default quota again."""
    with connect(url, key, data) as remote:
        remote.send("DELETE", f"/catalog/v1/tenants/{tenant}/quota")
    console.print(f"{tenant} has the default quota")
