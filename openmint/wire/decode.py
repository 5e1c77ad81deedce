"""Tinker training data and prompts as our types. Shapes and dtypes end here; meaning is checked
by the services, which know the base and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from openmint.errors import InvalidRequest, TooLarge, UnsupportedFormat
from openmint.types import AdamParams, Datum, IntArray, LossSpec
from openmint.wire import proto, requests
from openmint.wire.tensors import Unfolding, from_json, from_proto, tokens_from_bytes

PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """A `forward_backward` or `forward`: whose it is first, so that a bad one can be counted."""

    model_id: str
    seq_id: int | None
    forward_only: bool
    content: Callable[[], tuple[tuple[Datum, ...], LossSpec]]
    """Decodes data and loss. Raises InvalidRequest."""


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without its Content-Encoding. Raises TooLarge before it unfolds past the limit."""
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise UnsupportedFormat(f"Content-Encoding {encoding!r} is unknown; use zstd or none")
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body)
        unfolded = reader.read(max_bytes + 1)
    except zstandard.ZstdError:
        raise InvalidRequest("the body is not valid zstd") from None
    if len(unfolded) > max_bytes:
        raise TooLarge(f"the body unfolds to more than {max_bytes} bytes; send fewer data")
    return bytes(unfolded)


def train_request(body: bytes, content_type: str, *, forward_only: bool = False) -> TrainRequest:
    """A training request of either wire. Raises InvalidRequest."""
    if content_type.partition(";")[0].strip().lower() == PROTOBUF:
        return _train_from_proto(body)
    return _train_from_json(body, forward_only)


def adam_params(body: requests.OptimStep) -> AdamParams:
    """The update's hyper-parameters. Raises InvalidRequest for another optimizer or a bad value."""
    if body.optimizer_params is not None:
        check_optimizer(body.optimizer_params)
        raise InvalidRequest("send AdamW hyper-parameters as adam_params, not optimizer_params")
    adam = body.adam_params or requests.AdamJson()
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(adam, name)
        if not math.isfinite(value):
            raise InvalidRequest(f"adam_params/{name} must be finite, got {value}")
        if value < 0:
            raise InvalidRequest(f"adam_params/{name} must not be negative, got {value}")
    for name in ("beta1", "beta2"):
        if getattr(adam, name) >= 1:
            raise InvalidRequest(f"adam_params/{name} must be in [0, 1), got {getattr(adam, name)}")
    return AdamParams(**adam.model_dump(exclude={"type"}))


def check_optimizer(config: requests.OptimizerConfig) -> None:
    """Raises InvalidRequest unless the optimizer is AdamW without further settings."""
    if config.type != "adamw":
        raise InvalidRequest(f"optimizer {config.type!r} is not available; use 'adamw'")
    if config.model_extra:
        raise InvalidRequest(f"optimizer_config: unknown field {next(iter(config.model_extra))!r}")


def prompt_tokens(prompt: requests.ModelInput, where: str = "prompt") -> IntArray:
    """The token ids of a JSON model input. Raises InvalidRequest for images and sound."""
    chunks: list[IntArray] = []
    for index, chunk in enumerate(prompt.chunks):
        if isinstance(chunk, requests.OtherChunk):
            raise _not_text(chunk.type, f"{where}/chunks/{index}")
        chunks.append(_token_array(chunk.tokens, f"{where}/chunks/{index}/tokens"))
    return _join(chunks)


def _train_from_proto(body: bytes) -> TrainRequest:
    try:
        message = proto.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise InvalidRequest("the body is not a ForwardBackwardRequest protobuf") from None

    def content() -> tuple[tuple[Datum, ...], LossSpec]:
        config: dict[str, float | str] = dict(message.loss_fn_config)
        newer = message.loss_fn_config_v2.items()
        config.update({name: _config_value(value) for name, value in newer})
        unfolding = Unfolding()
        data = tuple(_datum_from_proto(d, i, unfolding) for i, d in enumerate(message.data))
        return data, _loss(message.loss_fn, config)

    return TrainRequest(message.model_id, message.seq_id, message.forward_only, content)


def _train_from_json(body: bytes, forward_only: bool) -> TrainRequest:
    parsed = requests.parse(requests.ForwardBackward, body)
    given = parsed.forward_backward_input or parsed.forward_input
    if given is None:
        raise InvalidRequest("body/forward_backward_input: this field is required")

    def content() -> tuple[tuple[Datum, ...], LossSpec]:
        unfolding = Unfolding()
        data = tuple(_datum_from_json(d, i, unfolding) for i, d in enumerate(given.data))
        return data, _loss(given.loss_fn, given.loss_fn_config or {})

    return TrainRequest(parsed.model_id, parsed.seq_id, forward_only, content)


def _datum_from_proto(message: Any, index: int, unfolding: Unfolding) -> Datum:
    where = f"data/{index}"
    chunks: list[IntArray] = []
    for position, chunk in enumerate(message.model_input):
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise _not_text(kind or "empty", f"{where}/model_input/{position}")
        chunks.append(tokens_from_bytes(chunk.encoded_text.tokens, f"{where}/model_input"))
    inputs = {
        name: from_proto(tensor, f"{where}/loss_fn_inputs/{name}", unfolding)
        for name, tensor in sorted(message.loss_fn_inputs.items())
    }
    return Datum(_join(chunks), inputs)


def _datum_from_json(datum: requests.DatumJson, index: int, unfolding: Unfolding) -> Datum:
    where = f"data/{index}"
    inputs = {
        name: from_json(tensor, f"{where}/loss_fn_inputs/{name}", unfolding)
        for name, tensor in sorted(datum.loss_fn_inputs.items())
    }
    return Datum(prompt_tokens(datum.model_input, f"{where}/model_input"), inputs)


def _config_value(value: Any) -> float | str:
    return str(value.text) if value.WhichOneof("value") == "text" else float(value.number)


def _loss(name: str, config: Mapping[str, float | str]) -> LossSpec:
    for key, value in config.items():
        if isinstance(value, str):
            raise InvalidRequest(f"loss_fn_config/{key}: a number is wanted, got {value[:40]!r}")
    return LossSpec(name, {key: float(value) for key, value in sorted(config.items())})


def _token_array(tokens: list[int], where: str) -> IntArray:
    try:
        return np.asarray(tokens, dtype=np.int64)
    except OverflowError:
        raise InvalidRequest(f"{where}: a token id does not fit 64 bits") from None


def _join(chunks: list[IntArray]) -> IntArray:
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int64)


def _not_text(kind: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"{where}: {kind} chunks are not supported; send encoded_text tokens")
