"""Safetensors files: reading a header without trusting it, writing the same bytes each time.

Format: u64 header length, JSON header, tensor bytes end to end. The parser caps the header before
it looks at it, and refuses what the reference parser lets through: duplicate keys, empty tensors,
odd names, gaps and overlaps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openmint.errors import InvalidRequest, UnsupportedFormat

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_TENSORS = 50_000
"""Limits of a file of which nothing is known; one of a base with more targets may have more."""
MAX_ENTRY_BYTES = 256
MAX_DIMENSIONS = 8
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,254}")
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
FOREIGN = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b")
"""First bytes of zip archives, pickles and gzip. Some are sound header lengths too (0x0280 is 640),
but then the rest of the length is zero."""


FileBytes = bytes | memoryview
TensorBytes = tuple[str, tuple[int, ...], bytes | memoryview]
"""dtype, shape and raw bytes of one tensor."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its bytes are `data[start:stop]` of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def encode_safetensors(tensors: Mapping[str, TensorBytes], metadata: Mapping[str, str]) -> bytes:
    """The file of these tensors, in an order that depends on their names alone.

    The library's own writer puts metadata in an order that changes from process to process.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position, parts = 0, []
    for name in sorted(tensors):
        dtype, shape, raw = tensors[name]
        stop = position + len(raw)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
        parts.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_header(data: FileBytes, num_expected: int = 0) -> Header:
    """Metadata and tensor entries. `num_expected` tensors may be in it however many that is.

    Raises UnsupportedFormat for pickles and archives, InvalidRequest for anything else that is not
    a sound safetensors file of float tensors.
    """
    most_bytes = max(MAX_HEADER_BYTES, num_expected * MAX_ENTRY_BYTES)
    most_tensors = max(MAX_TENSORS, num_expected)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > most_bytes or 8 + length > len(data):
        if bytes(data[:8]).startswith(FOREIGN):
            raise UnsupportedFormat(
                "these bytes are a pickle or an archive; only safetensors is read here. Save the "
                "adapter with save_pretrained(..., safe_serialization=True)"
            )
        raise InvalidRequest(
            f"not safetensors: header of {length} bytes (limit {most_bytes}) in {len(data)}"
        )
    raw = _parse(bytes(data[8 : 8 + length]))
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidRequest("safetensors __metadata__ must map names to strings")
    if len(raw) > most_tensors:
        raise InvalidRequest(f"safetensors file of {len(raw)} tensors; the limit is {most_tensors}")
    tensors = {name: _entry(name, value, 8 + length) for name, value in raw.items()}
    position = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != position:
            raise InvalidRequest(f"safetensors tensor {name!r} leaves a gap or overlaps another")
        position = entry.stop
    if position != len(data):
        raise InvalidRequest(
            f"safetensors file has {len(data)} bytes, its tensors end at {position}"
        )
    return Header(metadata, tensors)


def _parse(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise InvalidRequest("safetensors header does not begin with a JSON object")
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"safetensors header is not sound JSON: {error}") from None
    found: dict[str, Any] = raw
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _entry(name: str, value: Any, base: int) -> TensorEntry:
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"safetensors tensor name {name[:60]!r} has characters we don't admit")
    if not _is_sound(value):
        known = ", ".join(ITEM_BYTES)
        raise InvalidRequest(f"safetensors tensor {name!r} has an unsound entry; dtypes: {known}")
    dtype, shape = value["dtype"], tuple(value["shape"])
    start, stop = value["data_offsets"]
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if not size or stop - start != size:
        raise InvalidRequest(f"safetensors tensor {name!r}: {stop - start} bytes for shape {shape}")
    return TensorEntry(dtype, shape, base + start, base + stop)


def _is_sound(value: Any) -> bool:
    """Whether an entry has exactly the three keys, and values of the right types."""
    if not isinstance(value, dict) or value.keys() != ENTRY_KEYS:
        return False
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return False
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        return False
    if not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(x) is int and 0 <= x < 2**40 for x in (*shape, *offsets))
