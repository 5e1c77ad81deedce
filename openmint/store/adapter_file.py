"""The adapter file: a revision's bytes, in the engine's own layout, and their admission.

A safetensors file of few tensors, `<path within a layer>.lora_A [layers, r, in]` and `….lora_B
[layers, r, out]` (`[layers, experts, r, …]` of experts), whose bytes one after another are the
engine's flat vector: a load is one read and one copy, however many layers and experts there are.
The header's metadata carries rank, alpha, target groups and the base's digest. Equal weights give
equal bytes, hence equal digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmint.errors import InvalidRequest
from openmint.store.safetensors_header import (
    FileBytes,
    Header,
    TensorBytes,
    TensorEntry,
    encode_safetensors,
    read_header,
)
from openmint.types import BaseInfo, Digest, LoraSpec

FORMAT = "openmint-adapter/2"
BASE_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    spec: LoraSpec
    base_digest: str
    tensors: Mapping[str, TensorEntry]


def expected_tensors(base: BaseInfo, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter of this spec has on this base, in the order of
    the file and of the engine's flat vector."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stack in base.stacks_of(spec):
        shapes[f"{stack.name}.lora_A"] = (*stack.grid, spec.rank, stack.num_in)
        shapes[f"{stack.name}.lora_B"] = (*stack.grid, spec.rank, stack.num_out)
    return shapes


def encode_adapter(
    tensors: Mapping[str, TensorBytes], base_digest: Digest, spec: LoraSpec
) -> bytes:
    """The adapter file of these tensors, in an order that depends on their names alone."""
    metadata = {
        "format": FORMAT,
        "base": base_digest,
        "rank": str(spec.rank),
        "alpha": repr(float(spec.alpha)),
        "targets": ",".join(spec.groups),
    }
    return encode_safetensors(tensors, metadata)


def check_adapter(data: FileBytes, base: BaseInfo) -> AdapterHeader:
    """Admit an adapter file to a base: digest, names, shapes, dtypes, rank and finiteness.

    Raises InvalidRequest with the list of what does not match, UnsupportedFormat for pickles.
    """
    header = read_header(data)
    if header.metadata.get("format") != FORMAT:
        raise InvalidRequest(f"not an adapter file: format {show(header.metadata.get('format'))}")
    spec = _spec(header.metadata)
    if header.metadata.get("base") != base.digest:
        raise InvalidRequest(
            f"the adapter belongs to base {show(header.metadata.get('base'))}, "
            f"this one is {base.digest}"
        )
    if not 1 <= spec.rank <= base.max_rank:
        raise InvalidRequest(f"adapter rank {spec.rank} is outside 1..{base.max_rank}")
    problems = differences(header, expected_tensors(base, spec), BASE_DTYPES[base.dtype])
    problems += [f"{name}: NaN or infinite values" for name in _not_finite(data, header)]
    refuse(problems)
    return AdapterHeader(spec, str(base.digest), header.tensors)


def to_float32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Raw bytes in `dtype`; bfloat16 rounds to nearest, ties to even."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN's payload must not carry over into an infinity.
    rounded = np.where(np.isnan(values), 0x7FC0, rounded)
    return rounded.astype("<u2").tobytes()


def _spec(metadata: Mapping[str, str]) -> LoraSpec:
    try:
        groups = metadata["targets"].split(",")
        rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
    except (KeyError, ValueError):
        raise InvalidRequest("the adapter file's metadata lacks rank, alpha or targets") from None
    if unknown := set(groups) - {"attn", "mlp", "unembed"}:
        raise InvalidRequest(f"unknown target groups {show(sorted(unknown))}")
    if not 0.0 < alpha < 1e6:
        raise InvalidRequest(f"alpha {alpha} is outside 0..1e6")
    return spec_of(rank, alpha, set(groups))


def spec_of(rank: int, alpha: float, groups: set[str]) -> LoraSpec:
    return LoraSpec(rank, alpha, "attn" in groups, "mlp" in groups, "unembed" in groups)


def differences(
    header: Header, expected: Mapping[str, tuple[int, ...]], dtype: str | None
) -> list[str]:
    """What stands in the way of admission, tensor by tensor."""
    problems = [f"{name}: missing" for name in expected if name not in header.tensors]
    for name, entry in header.tensors.items():
        if name not in expected:
            problems.append(f"{name}: not a tensor of this adapter shape")
        elif entry.shape != expected[name]:
            problems.append(f"{name}: shape {entry.shape}, expected {expected[name]}")
        elif dtype is not None and entry.dtype != dtype:
            problems.append(f"{name}: dtype {entry.dtype}, expected {dtype}")
    return problems


def _not_finite(data: FileBytes, header: Header) -> list[str]:
    """Names of tensors whose exponent bits are all set somewhere (NaN or infinity).

    Among unsigned integers those are the largest negative numbers, among signed ones the largest
    positive: two maxima tell, without a copy of the values.
    """
    kinds = {"BF16": (2, 0x7F80), "F16": (2, 0x7C00), "F32": (4, 0x7F800000)}
    found = []
    for name, entry in header.tensors.items():
        size, infinity = kinds[entry.dtype]
        bits = np.frombuffer(data, f"<u{size}", (entry.stop - entry.start) // size, entry.start)
        sign = 1 << (8 * size - 1)
        most, most_positive = bits.max(initial=0), bits.view(f"<i{size}").max(initial=0)
        if most >= sign | infinity or most_positive >= infinity:
            found.append(name)
    return found


def show(value: object) -> str:
    """Foreign text as a message may hold it: short, and of characters that can be written."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."


def refuse(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InvalidRequest("adapter refused: " + "; ".join(problems[:MAX_LISTED]) + more)
