"""Results as the Tinker wire wants them: protobuf for training and sampling, JSON for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmint.scheduler.work import OptimResult, SampleResult, TrainResult
from openmint.types import FloatArray, TopLogprobs
from openmint.wire import proto

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
EMPTY_LOGPROB = -99999.0
"""What the wire writes where there is no k-th candidate."""
OUTPUT_TYPE = "ArrayRecord"


@dataclass(frozen=True, slots=True)
class SparseLayout:
    """Which cells of a dense (rows, K) array a CSR tensor lists."""

    crow: tuple[int, ...]
    columns: tuple[int, ...]

    def pick(self, dense_NK: FloatArray) -> FloatArray:
        """The listed cells of a dense array, in order."""
        rows = np.repeat(np.arange(len(self.crow) - 1), np.diff(self.crow))
        return np.asarray(dense_NK[rows, list(self.columns)], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """A SampleResult in the layout that its request asked for."""

    result: SampleResult
    target_layout: SparseLayout | None = None


def encode(result: object, accept: str) -> tuple[str, bytes]:
    """Content type and body of a finished result, protobuf where the client takes it."""
    binary = PROTOBUF in accept
    match result:
        case TrainResult():
            if binary:
                return PROTOBUF, _train_proto(result)
            return JSON, _dump(_train_json(result))
        case SampleAnswer():
            if binary:
                return PROTOBUF, _sample_proto(result)
            return JSON, _dump(_sample_json(result))
        case OptimResult():
            return JSON, _dump({"type": "optim_step", "metrics": result.metrics})
        case Mapping():
            return JSON, _dump(result)
        case _:
            raise TypeError(f"no wire form for {type(result).__name__}")


def _dump(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _train_proto(result: TrainResult) -> bytes:
    message = proto.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE)
    for name, value in result.metrics.items():
        message.metrics[name] = value
    for widths in _equal_widths(result.logprobs):
        record = message.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(widths))
        tensor = record.fields["logprobs"]
        tensor.data = b"".join(_f32(array) for array in widths)
        ends = np.cumsum([0, *(array.size * 4 for array in widths)], dtype="<i8")
        tensor.offsets = ends.tobytes()
        tensor.dtype = proto.FLOAT32
        tensor.trailing_shape.extend(widths[0].shape[1:])
    return bytes(message.SerializeToString())


def _equal_widths(arrays: Iterable[FloatArray]) -> Iterable[list[FloatArray]]:
    """Neighbours whose trailing shape is the same, in order; one record holds one such group."""
    group: list[FloatArray] = []
    for array in arrays:
        if group and array.shape[1:] != group[0].shape[1:]:
            yield group
            group = []
        group.append(array)
    if group:
        yield group


def _train_json(result: TrainResult) -> dict[str, Any]:
    return {
        "loss_fn_output_type": OUTPUT_TYPE,
        "loss_fn_outputs": [
            {"logprobs": _tensor_json(array, list(array.shape))} for array in result.logprobs
        ],
        "metrics": result.metrics,
    }


def _tensor_json(array: FloatArray, shape: list[int]) -> dict[str, Any]:
    return {"data": array.ravel().tolist(), "dtype": "float32", "shape": shape}


def _sample_proto(answer: SampleAnswer) -> bytes:
    result = answer.result
    message = proto.SampleResponse(prompt_cache_hit_tokens=result.num_cached_tokens)
    for sequence in result.sequences:
        reason = proto.STOP if sequence.stop_reason == "stop" else proto.LENGTH
        sent = message.sequences.add(stop_reason=reason)
        sent.tokens = sequence.tokens_N.astype("<i4").tobytes()
        sent.logprobs = _f32(sequence.logprobs_N)
        if sequence.top_logprobs is not None:
            _fill_topk(sent.topk_sampled_logprobs, sequence.top_logprobs)
    if result.prompt_logprobs_T is not None:
        message.prompt_logprobs = _f32(result.prompt_logprobs_T)
    if result.topk_prompt_logprobs is not None:
        _fill_topk(message.topk_prompt_logprobs, result.topk_prompt_logprobs)
    if (targets_NK := result.target_prompt_logprobs_NK) is not None:
        tensor = message.target_prompt_logprobs
        tensor.dtype = proto.FLOAT32
        tensor.shape.extend(targets_NK.shape)
        if (layout := answer.target_layout) is None:
            tensor.dense = _f32(targets_NK)
        else:
            tensor.sparse_csr.values = _f32(layout.pick(targets_NK))
            tensor.sparse_csr.crow_indices = np.asarray(layout.crow, "<i8").tobytes()
            tensor.sparse_csr.col_indices = np.asarray(layout.columns, "<i8").tobytes()
    if (drawn := result.prompt_alternatives) is not None:
        tokens, logprobs = message.prompt_alt_tokens.tokens, message.prompt_alt_tokens.logprobs
        tokens.dtype, tokens.dense = proto.INT64, drawn.token_ids_NK.astype("<i8").tobytes()
        logprobs.dtype, logprobs.dense = proto.FLOAT32, _f32(drawn.logprobs_NK)
        for tensor in (tokens, logprobs):
            tensor.shape.extend(drawn.token_ids_NK.shape)
    return bytes(message.SerializeToString())


def _f32(array: FloatArray) -> bytes:
    return array.astype("<f4").tobytes()


def _fill_topk(message: Any, top: TopLogprobs) -> None:
    empty_NK = ~np.isfinite(top.logprobs_NK)
    message.length, message.k = top.token_ids_NK.shape
    message.token_ids = np.where(empty_NK, 0, top.token_ids_NK).astype("<i4").tobytes()
    message.logprobs = _f32(np.where(empty_NK, np.float32(EMPTY_LOGPROB), top.logprobs_NK))


def _sample_json(answer: SampleAnswer) -> dict[str, Any]:
    result = answer.result
    content: dict[str, Any] = {"type": "sample", "sequences": []}
    for sequence in result.sequences:
        sent: dict[str, Any] = {
            "stop_reason": sequence.stop_reason,
            "tokens": sequence.tokens_N.tolist(),
            "logprobs": _or_null(sequence.logprobs_N),
        }
        if sequence.top_logprobs is not None:
            sent["topk_logprobs"] = _topk_json(sequence.top_logprobs)
        content["sequences"].append(sent)
    if result.prompt_logprobs_T is not None:
        content["prompt_logprobs"] = _or_null(result.prompt_logprobs_T)
    if result.topk_prompt_logprobs is not None:
        content["topk_prompt_logprobs"] = _topk_json(result.topk_prompt_logprobs)
    if (targets_NK := result.target_prompt_logprobs_NK) is not None:
        content["target_prompt_logprobs"] = {
            "data": _or_null(targets_NK.ravel()),
            "dtype": "float32",
            "shape": list(targets_NK.shape),
        }
    if (drawn := result.prompt_alternatives) is not None:
        shape = list(drawn.token_ids_NK.shape)
        tokens = {"data": drawn.token_ids_NK.ravel().tolist(), "dtype": "int64", "shape": shape}
        logprobs = _tensor_json(drawn.logprobs_NK, shape)
        content["prompt_alt_tokens"] = {"tokens": tokens, "logprobs": logprobs}
    return content


def _or_null(values: FloatArray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _topk_json(top: TopLogprobs) -> list[list[tuple[int, float]] | None]:
    rows = zip(top.token_ids_NK.tolist(), top.logprobs_NK.tolist(), strict=True)
    cells = ([pair for pair in zip(*row, strict=True) if math.isfinite(pair[1])] for row in rows)
    return [row or None for row in cells]
