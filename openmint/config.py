"""Settings: one frozen dataclass per component, composed here and read once at start.

Precedence: defaults < TOML file < environment (`OPENMINT_<SECTION>_<FIELD>`) < command-line flags.
The string under each field is its help text and its line in docs/configuration.md.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from openmint.errors import InvalidRequest

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker process and the base model resident in it (TOML section `worker`)."""

    device: str = "cpu"
    """Where the base lives: `cpu` or `cuda`."""
    dtype: str = "bfloat16"
    """Compute precision of the base and of serving adapters: `bfloat16` or `float32`."""
    threads: int = 0
    """Torch threads of each worker; 0 shares the machine's cores among the workers."""
    max_rank: int = 128
    """Largest LoRA rank that is admitted."""
    training_bytes: int = 2048 * MIB
    """Memory for training sessions: fp32 weights, gradients and Adam moments."""
    serving_bytes: int = 512 * MIB
    """Memory for resident revisions; the least recently used leaves first."""
    kv_cache_bytes: int = 384 * MIB
    """Memory for paged keys and values."""
    page_tokens: int = 16
    """Tokens per KV page."""
    step_tokens: int = 512
    """Most tokens in one sampling step, prefill and decode together."""
    running_sequences: int = 64
    """Most sequences that decode together."""
    micro_batch_tokens: int = 512
    """Tokens of one training micro-batch; a longer datum makes a micro-batch of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """The gateway's limits (TOML section `service`)."""

    max_body_bytes: int = 64 * MIB
    """Largest request body; beyond it the answer is 413."""
    max_header_bytes: int = 64 * 1024
    """Largest request head; beyond it the answer is 431."""
    long_poll_seconds: float = 25.0
    """How long retrieve_future holds a pending request before it answers 408."""
    future_ttl_seconds: float = 3600.0
    """How long a finished result can be fetched again."""
    session_timeout_seconds: float = 900.0
    """A session without heartbeat or request for this long is closed and its memory freed."""
    seq_gap_seconds: float = 5.0
    """How long a command waits for a missing earlier seq_id before it goes ahead."""
    default_alpha: float = 32.0
    """LoRA alpha of new runs; the update is scaled by alpha / rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that `openmint serve` needs (TOML top level)."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8411
    """Port to listen on; 0 picks a free one."""
    data: Path = Path("openmint-data")
    """Folder of the database, the store, converted bases and the first admin key."""
    bases: tuple[str, ...] = ("HuggingFaceTB/SmolLM2-135M-Instruct",)
    """Resident base models: the embedded name, or local Hugging Face folders."""
    database_url: str = ""
    """SQLAlchemy URL of the catalogue; empty means SQLite inside the data folder."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)


def load_settings(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from defaults, a TOML file, the environment and flags, later ones winning.

    Raises InvalidRequest that names an unknown key or a value of the wrong type.
    """
    environ = os.environ if environ is None else environ
    raw: dict[str, Any] = tomllib.loads(path.read_text()) if path else {}
    worker = _section(WorkerConfig(), raw.pop("worker", {}), environ, "WORKER")
    service = _section(ServiceConfig(), raw.pop("service", {}), environ, "SERVICE")
    settings = _section(Settings(worker=worker, service=service), raw, environ, "")
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    return _section(settings, given, {}, "")


Section = TypeVar("Section", WorkerConfig, ServiceConfig, Settings)


def _section(
    section: Section, raw: Mapping[str, Any], environ: Mapping[str, str], prefix: str
) -> Section:
    """The section with what the environment says, else what `raw` says."""
    known = {f.name: getattr(section, f.name) for f in fields(section)}
    if unknown := sorted(set(raw) - set(known)):
        raise InvalidRequest(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    changes: dict[str, Any] = {}
    for name, default in known.items():
        variable = "_".join(filter(None, ("OPENMINT", prefix, name.upper())))
        if variable in environ:
            changes[name] = _convert(variable, environ[variable], default)
        elif name in raw:
            changes[name] = _convert(name, raw[name], default)
    return replace(section, **changes)


def _convert(name: str, value: Any, default: Any) -> Any:
    try:
        if isinstance(default, Path):
            return Path(value)
        if isinstance(default, tuple):
            return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        return type(default)(value)
    except (TypeError, ValueError):
        kind = type(default).__name__
        raise InvalidRequest(f"setting {name} must be a {kind}, got {value!r}") from None
