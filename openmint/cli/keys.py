"""`openmint keys`: API keys, made and revoked directly in the catalogue."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from openmint.catalog.address import NAME
from openmint.catalog.records import ROLES, Role
from openmint.cli.data_folder import opened_catalog
from openmint.cli.output import EXIT_USAGE, JsonFlag, YesFlag, confirm, fail, show
from openmint.cli.remote import ConfigOption, FolderOption
from openmint.config import load_settings
from openmint.types import Tenant

app = typer.Typer(help="API keys: who may call, as which tenant.", no_args_is_help=True)

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_TTL_DAYS = 36_500
COLUMNS = ("key_id", "tenant", "role", "note", "created_at", "expires_at", "revoked_at")
TenantOption = Annotated[str, typer.Option("--tenant", help="Tenant that the key acts for.")]


@app.command()
def create(
    tenant: TenantOption,
    data: FolderOption = None,
    config: ConfigOption = None,
    role: Annotated[str, typer.Option(help="admin, train, serve or read.")] = "train",
    ttl: Annotated[str, typer.Option(help="Lifetime such as 90d, 12h, 30m; empty: no end.")] = "",
    note: Annotated[str, typer.Option(help="What the key is for.")] = "",
) -> None:
    """Make a key and print it, alone; it is shown this once."""
    if not NAME.fullmatch(tenant):
        fail(f"--tenant {tenant!r} must match {NAME.pattern}", EXIT_USAGE)
    expires_at = datetime.now(UTC) + parse_ttl(ttl) if ttl else None
    with opened_catalog(load_settings(config, flags={"data": data}), create=True) as catalog:
        key, _ = catalog.create_key(Tenant(tenant), _role(role), note=note, expires_at=expires_at)
    sys.stdout.write(key + "\n")


@app.command("list")
def list_keys(
    data: FolderOption = None,
    config: ConfigOption = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Keys with their tenant, role and lifetime; never the secrets."""
    with opened_catalog(load_settings(config, flags={"data": data}), create=False) as catalog:
        keys = catalog.keys(Tenant(tenant) if tenant else None)
    show(keys, as_json=as_json, columns=COLUMNS)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as `keys list` shows it.")],
    tenant: TenantOption,
    data: FolderOption = None,
    config: ConfigOption = None,
    yes: YesFlag = False,
) -> None:
    """End a key; requests with it are refused from then on."""
    confirm(f"Revoke key {key_id} of {tenant}?", yes=yes)
    with opened_catalog(load_settings(config, flags={"data": data}), create=False) as catalog:
        catalog.revoke_key(Tenant(tenant), key_id)


def parse_ttl(text: str) -> timedelta:
    """`90d`, `12h`, `30m` or `45s`, up to MAX_TTL_DAYS. Leaves with exit code 2 otherwise."""
    match = re.fullmatch(r"([1-9][0-9]{0,99})([smhd])", text)
    if match is None:
        fail(f"--ttl {text!r} is not a number and one of s, m, h, d; for example 90d", EXIT_USAGE)
    seconds = int(match[1]) * UNIT_SECONDS[match[2]]
    if seconds > MAX_TTL_DAYS * UNIT_SECONDS["d"]:
        fail(f"--ttl {text!r} is over the limit of {MAX_TTL_DAYS}d; omit it for no end", EXIT_USAGE)
    return timedelta(seconds=seconds)


def _role(text: str) -> Role:
    role = next((known for known in ROLES if known == text), None)
    if role is None:
        fail(f"--role {text!r} is unknown; use one of {', '.join(ROLES)}", EXIT_USAGE)
    return role
