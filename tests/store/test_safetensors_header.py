"""The header parser on files that are wrong on purpose; its answer is an error of ours, quickly."""

from __future__ import annotations

import json
import pickle
import time
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from openmint.errors import InvalidRequest, RequestError, UnsupportedFormat
from openmint.store.safetensors_header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    encode_safetensors,
    read_header,
)

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LOTS = 2**39


def packed(header: str | bytes, data: bytes = b"\0" * 4) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def with_entry(**changes: Any) -> bytes:
    return packed(json.dumps({"a": {**ENTRY, **changes}}))


def test_a_file_of_the_safetensors_library_is_read() -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones(2, np.float16)}
    data = save(arrays, metadata={"format": "np"})
    header = read_header(data)
    assert header.metadata == {"format": "np"}
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert entry.shape == array.shape
        assert data[entry.start : entry.stop] == array.tobytes()


@pytest.mark.parametrize(
    "data",
    [pickle.dumps({"a": 1}, protocol) for protocol in (2, 3, 4, 5)]
    + [b"PK\3\4" + b"x" * 50, b"\x1f\x8b" + b"x" * 50],
)
def test_pickles_and_archives_are_named_as_such(data: bytes) -> None:
    with pytest.raises(UnsupportedFormat, match="only safetensors"):
        read_header(data)


def test_a_header_length_that_begins_like_a_pickle_is_still_a_length() -> None:
    text = json.dumps({"a": ENTRY})
    data = packed(text.ljust(0x0280))
    assert data.startswith(b"\x80\x02")
    assert "a" in read_header(data).tensors


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        packed("{}")[:-5],
        packed("[]"),
        packed("1"),
        packed("{"),
        packed(b"\xff\xfe{}"),
        packed('{"a":1}'.encode("utf-16")),
        packed('{"__metadata__":{"a":1}}'),
        packed('{"__metadata__":[]}'),
        packed(json.dumps({"a": ENTRY})[:-1] + "," + json.dumps({"a": ENTRY})[1:]),
        packed(json.dumps({"a": ENTRY}), b"\0" * 5),
        packed(json.dumps({"a": ENTRY}), b"\0" * 3),
        packed(json.dumps({"a": ENTRY, "b": ENTRY})),
        packed(json.dumps({"a": {**ENTRY, "data_offsets": [4, 8]}}), b"\0" * 8),
        packed(json.dumps({"../../etc/x": ENTRY})),
        packed(json.dumps({"a\0": ENTRY})),
        packed(json.dumps({"\ud800": ENTRY})),
        packed(json.dumps({"a" * 256: ENTRY})),
        packed(json.dumps({"a": None})),
        packed(json.dumps({"a": "dtype"})),
        with_entry(dtype="I64"),
        with_entry(dtype=["F32"]),
        with_entry(shape="1"),
        with_entry(shape=[True]),
        with_entry(shape=[-1]),
        with_entry(shape=[0], data_offsets=[0, 0]),
        with_entry(shape=[1.0]),
        with_entry(shape=[LOTS] * 9),
        with_entry(data_offsets=[0]),
        with_entry(data_offsets=[4, 0]),
        with_entry(data_offsets={"0": 0, "4": 4}),
        with_entry(extra=1),
    ],
)
def test_unsound_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_header(data)
    assert len(refusal.value.message.encode()) < 500


@pytest.mark.parametrize(
    "header",
    [
        "[" * MAX_HEADER_BYTES,
        '{"a":' * (MAX_HEADER_BYTES // 5),
        json.dumps({"a": {**ENTRY, "shape": [LOTS] * 250_000}}),
        json.dumps({"a": {**ENTRY, "dtype": [[[]]] * 300_000}}),
        json.dumps({f"t{n}": [] for n in range(MAX_TENSORS + 1)}),
        '{"a":' + "9" * (MAX_HEADER_BYTES - 10) + "}",
        '{"__metadata__":{"format":"' + "x" * (MAX_HEADER_BYTES - 100) + '"},"a":1}',
    ],
    ids=["brackets", "objects", "dimensions", "dtype", "tensors", "digits", "metadata"],
)
def test_a_hostile_header_costs_little(header: str) -> None:
    assert len(header) <= MAX_HEADER_BYTES
    started = time.process_time()
    with pytest.raises(RequestError) as refusal:
        read_header(packed(header))
    assert time.process_time() - started < 2.0
    assert len(refusal.value.message) < 500


def test_a_header_over_the_cap_is_refused_unread() -> None:
    with pytest.raises(InvalidRequest, match="limit"):
        read_header(packed(b"{" * (MAX_HEADER_BYTES + 1)))


def test_a_base_of_many_targets_may_have_as_many_tensors() -> None:
    tensors = {f"{'t' * 60}{n}": ("F32", (1,), bytes(4)) for n in range(MAX_TENSORS + 1)}
    data = encode_safetensors(tensors, {})
    with pytest.raises(InvalidRequest, match="limit"):
        read_header(data)
    assert len(read_header(data, MAX_TENSORS + 1).tensors) == MAX_TENSORS + 1
