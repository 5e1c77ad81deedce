"""The adapter file: a revision's bytes, in the engine's own layout, and their admission.

A safetensors file of few tensors, `<path within a layer>.lora_A [layers, r, in]` and `….lora_B
[layers, r, out]`, whose bytes one after another are the engine's flat vector: a load is one read
and one copy, however many layers there are. The header's metadata carries rank, alpha, target
groups and the base's digest. Equal weights give equal bytes, hence equal digests. PEFT's layout is
made and read at the edge: a tensor for each A and B, `base_model.model.<path>.lora_A.weight` `[r,
in]` and `….lora_B.weight` `[out, r]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openmint.errors import InvalidRequest
from openmint.store.safetensors_header import (
    Header,
    TensorBytes,
    TensorEntry,
    encode_safetensors,
    read_header,
)
from openmint.types import BaseInfo, Digest, LoraSpec, TargetGroup, stacks_of

FORMAT = "openmint-adapter/2"
PREFIX = "base_model.model."
BASE_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
MAX_LISTED = 10
PLAIN = {
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
"""PEFT settings that change what an adapter computes, with the only value that we compute."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""PEFT initialisations that change the base's own weights; alone, such an adapter means nothing."""


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    spec: LoraSpec
    base_digest: str
    tensors: Mapping[str, TensorEntry]


def expected_tensors(base: BaseInfo, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter of this spec has on this base, in the order of
    the file and of the engine's flat vector."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stack in stacks_of(base.targets_of(spec)):
        shapes[f"{stack.name}.lora_A"] = (len(stack.targets), spec.rank, stack.num_in)
        shapes[f"{stack.name}.lora_B"] = (len(stack.targets), spec.rank, stack.num_out)
    return shapes


def peft_tensors(base: BaseInfo, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """The same as PEFT has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in base.targets_of(spec):
        shapes[f"{PREFIX}{target.path}.lora_A.weight"] = (spec.rank, target.num_in)
        shapes[f"{PREFIX}{target.path}.lora_B.weight"] = (target.num_out, spec.rank)
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


def check_adapter(data: bytes, base: BaseInfo) -> AdapterHeader:
    """Admit an adapter file to a base: digest, names, shapes, dtypes, rank and finiteness.

    Raises InvalidRequest with the list of what does not match, UnsupportedFormat for pickles.
    """
    header = read_header(data)
    if header.metadata.get("format") != FORMAT:
        raise InvalidRequest(f"not an adapter file: format {_show(header.metadata.get('format'))}")
    spec = _spec(header.metadata)
    if header.metadata.get("base") != base.digest:
        raise InvalidRequest(
            f"the adapter belongs to base {_show(header.metadata.get('base'))}, "
            f"this one is {base.digest}"
        )
    if not 1 <= spec.rank <= base.max_rank:
        raise InvalidRequest(f"adapter rank {spec.rank} is outside 1..{base.max_rank}")
    problems = _differences(header, expected_tensors(base, spec), BASE_DTYPES[base.dtype])
    problems += [f"{name}: NaN or infinite values" for name in _not_finite(data, header)]
    _refuse(problems)
    return AdapterHeader(spec, str(base.digest), header.tensors)


def from_peft(weights: bytes, adapter_config: Mapping[str, Any], base: BaseInfo) -> bytes:
    """The adapter file of a PEFT folder's adapter_model.safetensors and adapter_config.json.

    Values are rounded to the base's dtype. Raises InvalidRequest with the list of what is missing
    or not supported, UnsupportedFormat for pickles.
    """
    spec = _peft_spec(adapter_config, header := read_header(weights))
    if not 1 <= spec.rank <= base.max_rank:
        raise InvalidRequest(f"adapter rank {spec.rank} is outside 1..{base.max_rank}")
    _refuse(_differences(header, peft_tensors(base, spec), None))

    def values_of(name: str) -> npt.NDArray[np.float32]:
        entry = header.tensors[name]
        return to_float32(weights[entry.start : entry.stop], entry.dtype).reshape(entry.shape)

    dtype = BASE_DTYPES[base.dtype]
    tensors: dict[str, TensorBytes] = {}
    for stack in stacks_of(base.targets_of(spec)):
        stems = [f"{PREFIX}{target.path}" for target in stack.targets]
        a_LRI = np.stack([values_of(f"{stem}.lora_A.weight") for stem in stems])
        b_LRO = np.stack([values_of(f"{stem}.lora_B.weight").T for stem in stems])
        for side, values in (("lora_A", a_LRI), ("lora_B", b_LRO)):
            tensors[f"{stack.name}.{side}"] = (dtype, values.shape, from_float32(values, dtype))
    data = encode_adapter(tensors, base.digest, spec)
    check_adapter(data, base)
    return data


def to_peft(data: bytes, base: BaseInfo) -> dict[str, bytes]:
    """Files of a PEFT folder that `peft` and vLLM read, from an adapter file."""
    header = check_adapter(data, base)
    modules = sorted({t.path.rsplit(".", 1)[-1] for t in base.targets_of(header.spec)})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": header.spec.rank,
        "lora_alpha": header.spec.alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2).encode() + b"\n"
    return {
        "adapter_config.json": text,
        "adapter_model.safetensors": _peft_weights(data, header, base),
    }


def _peft_weights(data: bytes, header: AdapterHeader, base: BaseInfo) -> bytes:
    """An adapter file's values as PEFT's tensors, bit by bit the same."""

    def layers_of(name: str) -> tuple[str, npt.NDArray[Any]]:
        entry = header.tensors[name]
        kind = "<u2" if entry.dtype == "BF16" else "<u4"
        count = (entry.stop - entry.start) // np.dtype(kind).itemsize
        return entry.dtype, np.frombuffer(data, kind, count, entry.start).reshape(entry.shape)

    tensors: dict[str, TensorBytes] = {}
    for stack in stacks_of(base.targets_of(header.spec)):
        dtype, a_LRI = layers_of(f"{stack.name}.lora_A")
        _, b_LRO = layers_of(f"{stack.name}.lora_B")
        for target, a_RI, b_RO in zip(stack.targets, a_LRI, b_LRO, strict=True):
            for side, values in (("lora_A", a_RI), ("lora_B", b_RO.T)):
                name = f"{PREFIX}{target.path}.{side}.weight"
                tensors[name] = (dtype, values.shape, values.tobytes())
    return encode_safetensors(tensors, {"format": "pt"})


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
        raise InvalidRequest(f"unknown target groups {_show(sorted(unknown))}")
    if not 0.0 < alpha < 1e6:
        raise InvalidRequest(f"alpha {alpha} is outside 0..1e6")
    return _spec_of(rank, alpha, set(groups))


def _spec_of(rank: int, alpha: float, groups: set[str]) -> LoraSpec:
    return LoraSpec(rank, alpha, "attn" in groups, "mlp" in groups, "unembed" in groups)


def _peft_spec(config: Mapping[str, Any], header: Header) -> LoraSpec:
    """Rank and alpha as configured; target groups as the tensors themselves show."""
    odd = [
        f"{key}={_show(config[key])} (supported: {plain!r})"
        for key, plain in PLAIN.items()
        if config.get(key) not in (plain, None)
    ]
    if config.get("peft_type", "LORA") != "LORA":
        odd.append(f"peft_type={_show(config['peft_type'])} (supported: 'LORA')")
    if str(init := config.get("init_lora_weights")).lower().startswith(BASE_CHANGING_INITS):
        odd.append(f"init_lora_weights={_show(init)} (it changes the base; convert it on saving)")
    _refuse(odd)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise InvalidRequest("adapter_config.json needs an integer r and a positive lora_alpha")
    groups = {group for name in header.tensors if (group := _group_of(name)) is not None}
    if not groups:
        raise InvalidRequest("the file has no LoRA tensors of attention, MLP or lm_head layers")
    return _spec_of(rank, float(alpha), set(groups))


def _group_of(name: str) -> TargetGroup | None:
    if ".self_attn." in name:
        return "attn"
    if ".mlp." in name:
        return "mlp"
    return "unembed" if ".lm_head." in name else None


def _differences(
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


def _not_finite(data: bytes, header: Header) -> list[str]:
    """Names of tensors whose exponent bits are all set somewhere (NaN or infinity)."""
    masks = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}
    found = []
    for name, entry in header.tensors.items():
        kind, mask = masks[entry.dtype]
        bits = np.frombuffer(
            data, kind, (entry.stop - entry.start) // np.dtype(kind).itemsize, entry.start
        )
        if bool(((bits & mask) == mask).any()):
            found.append(name)
    return found


def _show(value: object) -> str:
    """Foreign text as a message may hold it: short, and of characters that can be written."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InvalidRequest("adapter refused: " + "; ".join(problems[:MAX_LISTED]) + more)
