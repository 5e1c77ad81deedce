"""Settings: one frozen dataclass per component, composed here and read once at start.

Precedence: defaults < TOML file < environment (`OPENMINT_<SECTION>_<FIELD>`) < command-line flags.
The string under each field is its help text and its line in docs/configuration.md.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
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
    serving_weights: str = "same"
    """Weights of the base that sampling reads: the `same` as training, or `int8`, its own copy,
    half as much to read, whose answers differ a little from what the trainer computes."""
    threads: int = 0
    """Torch threads of each worker; 0 shares the machine's cores among the workers."""
    tensor_parallel: int = 1
    """Processes, on GPUs one for each, among which a worker divides the heads and columns of its
    base."""
    expert_parallel: int = 1
    """Processes among which it divides the experts; where both are above 1 they are the same."""
    data_parallel: int = 1
    """Processes among which it divides the data of training, each with a part of every weight; not
    together with the two above."""
    max_rank: int = 128
    """Largest LoRA rank that is admitted."""
    training_bytes: int = 2048 * MIB
    """Memory for training sessions: fp32 weights, gradients and Adam moments."""
    host_bytes: int = 512 * MIB
    """Host memory for revisions that were read from the store; the one whose absence is likely to
    cost least leaves first."""
    serving_bytes: int = 512 * MIB
    """Memory for revisions laid out for the engine, its slots; those that find no place take
    turns."""
    parallel_loads: int = 2
    """Revisions that are read from the store at once."""
    waiting_loads: int = 4096
    """Most revisions that wait to be read; what would be one more is refused with 503."""
    load_deadline_seconds: float = 60.0
    """How long a sample that names no other time may wait for its revision to be in memory. It is
    refused with 503 at once when loads measured so far say that it would be longer."""
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
    durability: str = "step"
    """When an update is acknowledged: `step`, once its gradient is on disk; `every:n`, every n-th
    waits for the disk, the others only for the system, so that a power cut, and no crash, has up
    to n - 1 computed again; `replay`, at once: after any crash the requests since the last snapshot
    run again, which gives the same bits only when `deterministic`."""
    deterministic: bool = False
    """Never let policies share a micro-batch: a request's result is then the same to the bit
    whoever else trains, and a little slower when many small policies do."""

    def __post_init__(self) -> None:
        _at_least("worker.threads", self.threads, 0)
        _at_least("worker.max_rank", self.max_rank, 1)
        _at_least("worker.parallel_loads", self.parallel_loads, 1)
        _at_least("worker.tensor_parallel", self.tensor_parallel, 1)
        _at_least("worker.expert_parallel", self.expert_parallel, 1)
        _at_least("worker.data_parallel", self.data_parallel, 1)
        if self.data_parallel > 1 and max(self.tensor_parallel, self.expert_parallel) > 1:
            raise InvalidRequest(
                "setting worker.data_parallel can't be above 1 together with "
                "worker.tensor_parallel or worker.expert_parallel"
            )
        if len({self.tensor_parallel, self.expert_parallel} - {1}) > 1:
            raise InvalidRequest(
                "settings worker.tensor_parallel and worker.expert_parallel must be equal where "
                f"both are above 1, got {self.tensor_parallel} and {self.expert_parallel}"
            )
        _at_least("worker.page_tokens", self.page_tokens, 1)
        _at_least("worker.step_tokens", self.step_tokens, 1)
        _at_least("worker.running_sequences", self.running_sequences, 1)
        _at_least("worker.micro_batch_tokens", self.micro_batch_tokens, 1)
        if not re.fullmatch(r"step|replay|every:[1-9][0-9]{0,5}", self.durability):
            raise InvalidRequest(
                f"setting worker.durability is step, every:n or replay, got {self.durability!r}"
            )

    @property
    def num_ranks(self) -> int:
        """Processes that compute the base together."""
        return max(self.tensor_parallel, self.expert_parallel, self.data_parallel)

    @property
    def updates_per_sync(self) -> int:
        """How many updates share one wait for the disk; 0 when none is logged."""
        if self.durability == "replay":
            return 0
        return int(self.durability.removeprefix("every:").replace("step", "1"))


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
    seq_gap_seconds: float = 30.0
    """How long a command waits for a missing earlier seq_id before it goes ahead; what comes later
    than that is refused, as it would run out of order."""
    default_alpha: float = 32.0
    """LoRA alpha of new runs; the update is scaled by alpha / rank."""
    snapshot_updates: int = 20
    """Updates after which a run's state is saved by itself. Until then its gradients are kept, and
    after a crash its updates are made again from them."""
    snapshot_idle_seconds: float = 60.0
    """A changed run that nobody asks anything for this long is saved too."""
    journal_bytes: int = 2048 * MIB
    """Kept gradients of one base, beyond which the runs with most of them are saved earlier."""
    tenant_requests_per_minute: int = 0
    """Requests a minute of a tenant that has no quota of its own, polls and heartbeats aside; 0 is
    without limit, here and below."""
    tenant_tokens_per_minute: int = 0
    """The same for its tokens, trained, read and generated."""
    tenant_resident_adapters: int = 0
    """The same for its live training runs and the revisions that it samples from at one time or has
    pinned."""
    tenant_stored_bytes: int = 0
    """The same for the bytes of its checkpoints and revisions."""
    pin_share: float = 0.5
    """Part of each worker's `worker.host_bytes` that revisions of pinned aliases may take; a pin
    that would take more is refused."""
    tenant_pin_share: float = 0.25
    """The same for the pins of one tenant."""
    keep_revisions: int = 0
    """How many of its newest revisions a policy keeps that says nothing itself; 0 is all. What an
    alias names is kept besides, and what its last moves may be rolled back to."""
    keep_rollbacks: int = 10
    """How many rollbacks of each alias find their revision still there, however old it is."""
    replay: str = "mask"
    """What training with a policy loss makes of the experts and keys that tokens chose when they
    were sampled. `mask` repeats them, and leaves tokens out of which nothing is recorded, in
    sequences of which something is. `measure` only says how far training is from them; `off` does
    nothing. A base without such choices has nothing to repeat."""
    route_record_bytes: int = 1 << 28
    """Memory for such records, which leave when they were not asked for longest."""
    grace_seconds: float = 3600.0
    """How long the bytes of a deleted revision are left in the store. States of training and
    unnamed saves go at once."""
    drift_alarm: float = 0.25
    """Nats between trainer and sampler, on one token of a revision's probe, above which the log and
    `openmint_probes_total` say so. 0 to 0.05 is usual; with int8 weights up to 0.2."""
    routing: str = "residency"
    """How one of several workers of a base is chosen: `residency`, or `sticky`, by a hash of the
    revision alone."""
    worker_silence_seconds: float = 300.0
    """A worker that says nothing for this long is taken to hang: it is killed and started again.
    It speaks between steps, so keep this above the longest step."""

    def __post_init__(self) -> None:
        _at_least("service.snapshot_updates", self.snapshot_updates, 1)
        if self.routing not in ("residency", "sticky"):
            raise InvalidRequest(
                f"setting service.routing is residency or sticky, got {self.routing!r}"
            )
        if self.replay not in ("mask", "measure", "off"):
            raise InvalidRequest(
                f"setting service.replay is mask, measure or off, got {self.replay!r}"
            )
        _at_least("service.route_record_bytes", self.route_record_bytes, 0)
        _within("service.pin_share", self.pin_share, 0.0, 0.9)
        _within("service.tenant_pin_share", self.tenant_pin_share, 0.0, 0.9)
        _at_least("service.keep_revisions", self.keep_revisions, 0)
        _at_least("service.keep_rollbacks", self.keep_rollbacks, 0)
        _at_least("service.grace_seconds", self.grace_seconds, 0)
        _at_least("service.worker_silence_seconds", self.worker_silence_seconds, 3)


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
    replicas: int = 1
    """Workers of each base, each with a copy of it. The first trains and serves, the others serve:
    a sample goes to the one that has its revision, unless another is much less busy."""
    database_url: str = ""
    """The catalogue's database: `postgresql://user:password@host/database` (docs/operations.md) or
    `sqlite:///path`; empty means SQLite inside the data folder. `openmint keys`, `doctor` and
    `backup` read the same environment, and the same file with `--config`."""
    store_url: str = ""
    """Where adapters and training states are kept: `s3://bucket/prefix` (docs/operations.md), with
    key, region and endpoint in the usual `AWS_*` variables; empty means inside the data folder."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)

    def __post_init__(self) -> None:
        _at_least("replicas", self.replicas, 1)


def load_settings(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from defaults, a TOML file, the environment and flags, later ones winning.

    Raises InvalidRequest that names an unknown key or a value of the wrong type.
    """
    environ = os.environ if environ is None else environ
    raw = _read_toml(path) if path else {}
    worker = _section(WorkerConfig(), raw.pop("worker", {}), environ, "worker.")
    service = _section(ServiceConfig(), raw.pop("service", {}), environ, "service.")
    settings = _section(Settings(worker=worker, service=service), raw, environ, "")
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    return _section(settings, given, {}, "")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidRequest(f"could not read the settings file: {error}") from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is not valid TOML: {error}") from None


Section = TypeVar("Section", WorkerConfig, ServiceConfig, Settings)


def _section(section: Section, raw: Any, environ: Mapping[str, str], prefix: str) -> Section:
    """The section with what the environment says, else what `raw` says."""
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"setting {prefix.rstrip('.')} must be a section, got {raw!r}")
    values = {f.name: getattr(section, f.name) for f in fields(section)}
    # A section inside this one was read before.
    known = {name: value for name, value in values.items() if not is_dataclass(value)}
    if unknown := sorted(set(raw) - set(known)):
        listed = ", ".join(sorted(known))
        raise InvalidRequest(f"unknown setting {prefix + unknown[0]!r}; known: {listed}")
    changes: dict[str, Any] = {}
    for name, default in known.items():
        variable = f"OPENMINT_{prefix}{name}".replace(".", "_").upper()
        if variable in environ:
            changes[name] = _from_text(variable, environ[variable], default)
        elif name in raw:
            changes[name] = _checked(prefix + name, raw[name], default)
    return replace(section, **changes)


def _from_text(name: str, text: str, default: Any) -> Any:
    """A value of the default's type, from an environment variable."""
    if isinstance(default, tuple):
        return tuple(text.split(","))
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise _wrong_type(name, text, default)
        return text == "true"
    try:
        value = type(default)(text)
    except ValueError:
        raise _wrong_type(name, text, default) from None
    return _checked(name, value, default)


def _checked(name: str, value: Any, default: Any) -> Any:
    """The value as the default's type, where it is one already or loses nothing by becoming it."""
    match default:
        case tuple() if isinstance(value, str):
            return (value,)
        case tuple() if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        case Path() if isinstance(value, str | Path):
            return Path(value)
        case float() if type(value) in (int, float) and math.isfinite(value):
            return float(value)
        case int() | str() if type(value) is type(default):
            return value
    raise _wrong_type(name, value, default)


def _wrong_type(name: str, value: Any, default: Any) -> InvalidRequest:
    kind = "Path" if isinstance(default, Path) else type(default).__name__
    return InvalidRequest(f"setting {name} must be a {kind}, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise InvalidRequest(f"setting {name} must be at least {least}, got {value}")


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"setting {name} must be {least:g} to {most:g}, got {value:g}")
