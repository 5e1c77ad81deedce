"""Adapter files: stable bytes, admission, mutants."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import safetensors.torch
import torch

from openmint.errors import InvalidRequest, OpenMintError, UnsupportedFormat
from openmint.store.adapter_file import (
    check_adapter,
    encode_adapter,
    expected_tensors,
    from_float32,
    to_float32,
)
from openmint.store.safetensors_header import TensorBytes, read_header
from openmint.types import Digest, LoraSpec
from tests.store.tiny_base import BASE, mutant

SPEC = LoraSpec(4, 8.0)


def random_tensors(spec: LoraSpec = SPEC, dtype: str = "F32") -> dict[str, TensorBytes]:
    rng = np.random.default_rng(0)
    return {
        name: (dtype, shape, from_float32(rng.normal(size=shape).astype(np.float32), dtype))
        for name, shape in expected_tensors(BASE, spec).items()
    }


def adapter(spec: LoraSpec = SPEC) -> bytes:
    return encode_adapter(random_tensors(spec), BASE.digest, spec)


def test_equal_weights_give_equal_bytes_in_any_order() -> None:
    tensors = random_tensors()
    backwards = dict(reversed(tensors.items()))
    assert encode_adapter(backwards, BASE.digest, SPEC) == adapter()
    loaded = safetensors.torch.load(adapter())
    for name, (_, shape, raw) in tensors.items():
        assert loaded[name].shape == shape
        assert loaded[name].numpy().tobytes() == raw


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(1, 32.0),
        LoraSpec(8, 0.5, train_mlp=False, train_unembed=False),
        LoraSpec(2, 16.0, train_attn=False),
    ],
)
def test_an_adapter_of_its_base_is_admitted(spec: LoraSpec) -> None:
    header = check_adapter(adapter(spec), BASE)
    assert header.spec == spec
    assert {n: e.shape for n, e in header.tensors.items()} == expected_tensors(BASE, spec)


def test_admission_lists_what_differs_and_at_most_ten() -> None:
    tensors = random_tensors()
    first, second, third, fourth, *_ = tensors
    del tensors[first]
    tensors[second] = ("F32", (1, 1), bytes(4))
    dtype, shape, raw = tensors[third]
    tensors[third] = ("BF16", shape, raw[: len(raw) // 2])
    tensors[fourth] = (dtype, tensors[fourth][1], b"\0\0\x80\x7f" + tensors[fourth][2][4:])
    tensors["another"] = ("F32", (1,), bytes(4))
    with pytest.raises(InvalidRequest) as refusal:
        check_adapter(encode_adapter(tensors, BASE.digest, SPEC), BASE)
    for part in (f"{first}: missing", f"{second}: shape", f"{third}: dtype", "another: not a"):
        assert part in refusal.value.message
    assert f"{fourth}: NaN or infinite" in refusal.value.message
    with pytest.raises(InvalidRequest, match="and 7 more") as refusal:
        check_adapter(encode_adapter({"a": ("F32", (1,), bytes(4))}, BASE.digest, SPEC), BASE)
    assert refusal.value.message.count("missing") == 10


@pytest.mark.parametrize("bits", [b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\xff\xff"])
def test_bfloat16_infinities_and_nans_are_refused(bits: bytes) -> None:
    base = dataclasses.replace(BASE, dtype="bfloat16")
    tensors = random_tensors(dtype="BF16")
    assert check_adapter(encode_adapter(tensors, base.digest, SPEC), base).spec == SPEC
    name, (dtype, shape, raw) = next(iter(tensors.items()))
    tensors[name] = (dtype, shape, raw[:-2] + bits)
    with pytest.raises(InvalidRequest, match="NaN or infinite"):
        check_adapter(encode_adapter(tensors, base.digest, SPEC), base)


def test_another_base_rank_or_format_is_refused() -> None:
    other = dataclasses.replace(BASE, digest=Digest("sha256:" + "cd" * 32))
    with pytest.raises(InvalidRequest, match="belongs to base"):
        check_adapter(adapter(), other)
    with pytest.raises(InvalidRequest, match=r"rank 4 is outside 1\.\.2"):
        check_adapter(adapter(), dataclasses.replace(BASE, max_rank=2))
    with pytest.raises(InvalidRequest, match="not an adapter file"):
        check_adapter(safetensors.torch.save({"a": torch.ones(1)}), BASE)
    with pytest.raises(UnsupportedFormat):
        check_adapter(b"\x80\x04}\x94.", BASE)


@pytest.mark.parametrize("text", ["\ud800", "x" * 10_000])
@pytest.mark.parametrize("key", ["format", "base", "targets", "rank", "alpha"])
def test_foreign_metadata_in_a_message_stays_short_and_writable(key: str, text: str) -> None:
    data = adapter()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"][key] = text
    changed = json.dumps(header).encode()
    with pytest.raises(InvalidRequest) as refusal:
        check_adapter(len(changed).to_bytes(8, "little") + changed + data[end:], BASE)
    assert len(refusal.value.message.encode()) < 500


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    ours = to_float32(from_float32(values, "BF16"), "BF16")
    theirs = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_mutants_are_admitted_or_refused_and_never_more() -> None:
    spec = LoraSpec(1, 8.0, train_mlp=False, train_unembed=False)
    data, rng, num_refused = adapter(spec), random.Random(5), 0
    for _ in range(15_000):
        try:
            header = check_adapter(changed := mutant(data, rng), BASE)
        except OpenMintError as refusal:
            num_refused += 1
            refusal.message.encode()
        else:
            expected = expected_tensors(BASE, header.spec)
            assert {n: e.shape for n, e in read_header(changed).tensors.items()} == expected
    assert num_refused > 10_000
