"""What a request may contain, given the base that it goes to. Every refusal names the limit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from openmint.errors import InvalidRequest
from openmint.losses.spec import LossDef, loss_def
from openmint.types import BaseInfo, Datum, IntArray, LoraSpec, LossSpec

MAX_SAMPLES = 256
MAX_TOP_LOGPROBS = 100
MAX_TARGETS = 1024
MAX_STOPS = 64
MAX_METADATA_BYTES = 16 * 1024
MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=:@-]*")
_POLICY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


def check_name(name: str, what: str) -> str:
    """`name`, if it may name a checkpoint. Raises InvalidRequest."""
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidRequest(f"{what} has {len(name)} characters; the limit is {MAX_NAME_LENGTH}")
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{what} {name!r} is not allowed; use letters, digits and . _ - + = : @, "
            "starting with a letter, digit or _, without '..'"
        )
    return name


def check_policy_name(name: object) -> str:
    """`name`, if it may name a policy. Raises InvalidRequest."""
    if isinstance(name, str) and _POLICY_NAME.fullmatch(name) and ".." not in name:
        return name
    raise InvalidRequest(
        f"policy name {str(name)[:140]!r} is not allowed; use 1 to 128 of a-z 0-9 . _ -, "
        "starting with a letter or digit, without '..'"
    )


def check_metadata(metadata: Mapping[str, object] | None) -> dict[str, str]:
    """The metadata with every value as text, as the wire's readers want it."""
    texts = {
        key: value if isinstance(value, str) else _json_text(value)
        for key, value in (metadata or {}).items()
        if value is not None
    }
    size = sum(len(key) + len(value) for key, value in texts.items())
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"user_metadata has {size} characters; the limit is {MAX_METADATA_BYTES}"
        )
    return texts


def check_spec(spec: LoraSpec, base: BaseInfo) -> None:
    """Raises InvalidRequest unless the base admits an adapter of this shape."""
    if not 1 <= spec.rank <= base.max_rank:
        raise InvalidRequest(
            f"lora_config/rank must be 1 to {base.max_rank} on {base.name}, got {spec.rank}"
        )
    if not spec.groups:
        raise InvalidRequest(
            "lora_config trains nothing; set train_attn, train_mlp or train_unembed"
        )


def check_data(data: tuple[Datum, ...], loss: LossSpec, base: BaseInfo) -> None:
    """Raises InvalidRequest unless every datum holds what the loss reads, in range and finite."""
    found = loss_def(loss.name)
    _check_loss_config(loss, found)
    if not data:
        raise InvalidRequest("data is empty; send at least one datum")
    for index, datum in enumerate(data):
        _check_datum(datum, f"data/{index}", found, base)


def check_tokens(tokens_T: IntArray, where: str, base: BaseInfo) -> None:
    """Raises InvalidRequest for a token id outside the base's vocabulary."""
    outside = np.flatnonzero((tokens_T < 0) | (tokens_T >= base.vocab_size))
    if outside.size:
        bad = int(tokens_T.ravel()[outside[0]])
        raise InvalidRequest(
            f"{where}: token id {bad} at position {int(outside[0])} is outside "
            f"0..{base.vocab_size - 1}, the vocabulary of {base.name}"
        )


def _json_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _check_loss_config(loss: LossSpec, found: LossDef) -> None:
    for key, value in loss.config.items():
        if key not in found.config:
            known = ", ".join(sorted(found.config)) or "none"
            raise InvalidRequest(f"loss_fn_config/{key}: unknown for {loss.name}; known: {known}")
        if not math.isfinite(value) or value < 0:
            raise InvalidRequest(
                f"loss_fn_config/{key} must be finite and not negative, got {value}"
            )
    merged = {**found.config, **loss.config}
    low, high = merged.get("clip_low_threshold", 0.0), merged.get("clip_high_threshold", 1.0)
    if low > high:
        raise InvalidRequest(
            f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}"
        )


def _check_datum(datum: Datum, where: str, loss: LossDef, base: BaseInfo) -> None:
    num_tokens = datum.tokens_N.size
    if num_tokens == 0:
        raise InvalidRequest(f"{where}/model_input has no tokens")
    if num_tokens > base.context_length:
        raise InvalidRequest(
            f"{where}/model_input has {num_tokens} tokens; the context of {base.name} holds "
            f"{base.context_length}"
        )
    check_tokens(datum.tokens_N, f"{where}/model_input", base)
    for name in loss.required:
        if name not in datum.inputs:
            raise InvalidRequest(f"{where}/loss_fn_inputs/{name} is missing; {loss.name} reads it")
    for name in datum.inputs:
        if name not in loss.inputs:
            known = ", ".join(loss.inputs)
            raise InvalidRequest(
                f"{where}/loss_fn_inputs/{name}: {loss.name} does not read it; it reads {known}"
            )
    _check_inputs(datum, where, loss, base)


def _check_inputs(datum: Datum, where: str, loss: LossDef, base: BaseInfo) -> None:
    targets = datum.inputs["target_tokens"]
    if targets.dtype.kind != "i":
        raise InvalidRequest(f"{where}/loss_fn_inputs/target_tokens must be int64")
    if targets.shape[0] != datum.tokens_N.size:
        raise InvalidRequest(
            f"{where}/loss_fn_inputs/target_tokens has length {targets.shape[0]}, but model_input "
            f"has {datum.tokens_N.size} tokens; they must match"
        )
    if targets.ndim == 2 and not loss.multi_target:
        raise InvalidRequest(
            f"{where}/loss_fn_inputs/target_tokens: {loss.name} takes shape (N,), "
            f"got {list(targets.shape)}"
        )
    if targets.ndim == 2 and not 1 <= targets.shape[1] <= MAX_TARGETS:
        raise InvalidRequest(
            f"{where}/loss_fn_inputs/target_tokens: 1 to {MAX_TARGETS} targets per position, "
            f"got {targets.shape[1]}"
        )
    check_tokens(targets.astype(np.int64), f"{where}/loss_fn_inputs/target_tokens", base)
    for name, values in datum.inputs.items():
        if name == "target_tokens":
            continue
        if values.shape != targets.shape:
            raise InvalidRequest(
                f"{where}/loss_fn_inputs/{name} has shape {list(values.shape)}, but target_tokens "
                f"has {list(targets.shape)}; they must match"
            )
        finite = np.isfinite(values.astype(np.float64))
        if not finite.all():
            position = int(np.flatnonzero(~finite)[0])
            raise InvalidRequest(
                f"{where}/loss_fn_inputs/{name}: the value at position {position} is "
                f"{values.ravel()[position]}; finite numbers are wanted"
            )
