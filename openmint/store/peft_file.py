"""PEFT's files of an adapter, which are made where one leaves and read where one comes in.

A tensor for each A and B, `base_model.model.<path>.lora_A.weight [r, in]` and `….lora_B.weight
[out, r]`, and `adapter_config.json`. Experts have theirs one by one, which `peft`, vLLM and SGLang
all read, or fused as PEFT itself trains them (`fused_experts.py`); `expert_files.py` says which of
the two a family's readers take, and under which names.

PEFT takes `gate_proj` among `target_modules` for that of experts, wherever a model has any, and
leaves the tensors of dense layers and shared experts unread without a word. These are hence named
by their weights, in `target_parameters`; their names in the file are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from openmint.errors import InvalidRequest
from openmint.store.adapter_file import (
    BASE_DTYPES,
    AdapterHeader,
    check_adapter,
    differences,
    encode_adapter,
    from_float32,
    refuse,
    show,
    spec_of,
    to_float32,
)
from openmint.store.expert_files import Experts, expert_files
from openmint.store.fused_experts import (
    GATE_UP,
    PARAMETERS,
    Pair,
    Values,
    fused_experts,
    halved,
    has_experts,
)
from openmint.store.safetensors_header import (
    FileBytes,
    Header,
    TensorBytes,
    encode_safetensors,
    read_header,
)
from openmint.types import BaseInfo, LoraSpec, TargetGroup, TargetStack

PREFIX = "base_model.model."
FUSED = ".experts.lora_A.weight"
"""How a tensor's name ends that only fused experts have."""

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


def peft_tensors(
    base: BaseInfo, spec: LoraSpec, experts: Experts = "each", gate_up_rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that PEFT has of an adapter of this spec."""
    stacks, files = base.stacks_of(spec), expert_files(base.architecture)
    shapes: dict[str, tuple[int, ...]] = {}
    for stack in stacks:
        if experts == "fused" and has_experts(stack):
            continue
        for target in stack.targets:
            stem = PREFIX + files.name_of(target.path)
            shapes[f"{stem}.lora_A.weight"] = (spec.rank, target.num_in)
            shapes[f"{stem}.lora_B.weight"] = (target.num_out, spec.rank)
    if experts == "fused":
        for module in fused_experts(stacks, alternates=files.alternates):
            shapes |= module.shapes(PREFIX, spec.rank, gate_up_rank)
    return shapes


def from_peft(weights: bytes, adapter_config: Mapping[str, Any], base: BaseInfo) -> bytes:
    """The adapter file of a PEFT folder's adapter_model.safetensors and adapter_config.json.

    Values are rounded to the base's dtype. Where gate and up share an A of twice the others' rank,
    and one uses more than its half, the adapter has that rank, and zeros in its other modules.
    Raises InvalidRequest with the list of what is missing or not supported, UnsupportedFormat for
    pickles.
    """
    header = read_header(weights, 2 * sum(len(stack.targets) for stack in base.stacks))
    experts: Experts = "fused" if any(name.endswith(FUSED) for name in header.tensors) else "each"
    adapter_config, gate_up_rank = _without_parameters(adapter_config, experts)
    spec = _peft_spec(adapter_config, header)
    if not 1 <= spec.rank <= base.max_rank:
        raise InvalidRequest(f"adapter rank {spec.rank} is outside 1..{base.max_rank}")
    refuse(differences(header, peft_tensors(base, spec, experts, gate_up_rank), None))

    def value_of(name: str) -> Values:
        entry = header.tensors[name]
        return to_float32(weights[entry.start : entry.stop], entry.dtype).reshape(entry.shape)

    stacks, dtype = base.stacks_of(spec), BASE_DTYPES[base.dtype]
    sides: dict[str, Pair] = {}
    if experts == "fused":
        sides |= _read_fused(value_of, base, spec, gate_up_rank)
    for stack in stacks:
        if stack.name not in sides:
            sides[stack.name] = _read_each(value_of, base, stack)
    rank = max(a.shape[-2] for a, _ in sides.values())
    spec = replace(spec, rank=rank, alpha=spec.alpha * (rank // spec.rank))
    tensors: dict[str, TensorBytes] = {}
    for stack in stacks:
        widths = stack.num_in, stack.num_out
        for side, values, width in zip("AB", sides.pop(stack.name), widths, strict=True):
            shape = (*stack.grid, rank, width)
            raw = from_float32(_padded(values, rank), dtype)
            tensors[f"{stack.name}.lora_{side}"] = (dtype, shape, raw)
    data = encode_adapter(tensors, base.digest, spec)
    check_adapter(data, base)
    return data


def _padded(values: Values, rank: int) -> Values:
    """With zeros up to the rank, which is the last but one axis."""
    axes = [(0, 0)] * values.ndim
    axes[-2] = (0, rank - values.shape[-2])
    return np.pad(values, axes) if axes[-2][1] else values


def _read_each(value_of: Callable[[str], Values], base: BaseInfo, stack: TargetStack) -> Pair:
    files = expert_files(base.architecture)
    stems = [PREFIX + files.name_of(target.path) for target in stack.targets]
    a_NRI = np.stack([value_of(f"{stem}.lora_A.weight") for stem in stems])
    return a_NRI, np.stack([value_of(f"{stem}.lora_B.weight").T for stem in stems])


def _read_fused(
    value_of: Callable[[str], Values], base: BaseInfo, spec: LoraSpec, gate_up_rank: int
) -> dict[str, Pair]:
    stacks, files = base.stacks_of(spec), expert_files(base.architecture)
    modules = fused_experts(stacks, alternates=files.alternates)
    layers = [module.take_apart(value_of, PREFIX, spec.rank, gate_up_rank) for module in modules]
    if gate_up_rank > spec.rank:
        halves = [half for layer in layers if (half := halved(layer, spec.rank))]
        layers = halves if len(halves) == len(layers) else layers
    pairs: dict[str, Pair] = {}
    for stack in filter(has_experts, stacks):
        leaf = stack.name.rpartition(".")[2]
        a_LERI, b_LERO = (np.stack([layer[leaf][side] for layer in layers]) for side in (0, 1))
        pairs[stack.name] = a_LERI, b_LERO
    return pairs


def to_peft(data: FileBytes, base: BaseInfo, experts: Experts | None = None) -> dict[str, bytes]:
    """Files of a PEFT folder, from an adapter file; its values bit by bit.

    Experts are laid out as readers of the base's family want them, unless told otherwise.
    Raises InvalidRequest for a layout that PEFT can't read.
    """
    header = check_adapter(data, base)
    stacks, files = base.stacks_of(header.spec), expert_files(base.architecture)
    any_experts = any(map(has_experts, stacks))
    is_fused = any_experts and (experts or files.default) == "fused"
    if any_experts and not is_fused and not files.reads_each:
        raise InvalidRequest(
            f"PEFT reads no experts of {base.architecture} one by one; export them 'fused'"
        )
    named = [stack for stack in stacks if not (is_fused and has_experts(stack))]
    tensors: dict[str, TensorBytes] = {}
    for stack in named:
        dtype, a_NRI, b_NRO = _stacked(data, header, stack)
        for target, a_RI, b_RO in zip(stack.targets, a_NRI, b_NRO, strict=True):
            stem = PREFIX + files.name_of(target.path)
            for side, values in (("lora_A", a_RI), ("lora_B", b_RO.T)):
                tensors[f"{stem}.{side}.weight"] = (dtype, values.shape, values.tobytes())
    if is_fused:
        tensors |= _fused_tensors(data, header, base)
    config = _config(base, header.spec, is_fused=is_fused)
    return {
        "adapter_config.json": json.dumps(config, indent=2).encode() + b"\n",
        "adapter_model.safetensors": encode_safetensors(tensors, {"format": "pt"}),
    }


def _config(base: BaseInfo, spec: LoraSpec, *, is_fused: bool) -> dict[str, Any]:
    """Settings with which PEFT finds every module of the adapter."""
    stacks, files = base.stacks_of(spec), expert_files(base.architecture)
    any_experts = any(map(has_experts, stacks))
    beside = [s for s in stacks if any_experts and s.group == "mlp" and not has_experts(s)]
    named = [s for s in stacks if s not in beside and not (is_fused and has_experts(s))]
    leaves = {files.name_of(stack.targets[0].path).rpartition(".")[2] for stack in named}
    parameters = [f"{stack.name}.weight" for stack in beside] + (PARAMETERS if is_fused else [])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": sorted(leaves),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if parameters:
        config["target_parameters"] = parameters
    if is_fused:
        config["rank_pattern"] = {GATE_UP: 2 * spec.rank}
        config["alpha_pattern"] = {GATE_UP: 2 * spec.alpha}
    return config


def _stacked(
    data: FileBytes, header: AdapterHeader, stack: TargetStack
) -> tuple[str, Values, Values]:
    """The dtype of a stack's values, their bits of A `[targets, r, in]`, and of B."""

    def bits_of(name: str, width: int) -> Values:
        entry = header.tensors[name]
        kind = "<u2" if entry.dtype == "BF16" else "<u4"
        count = (entry.stop - entry.start) // np.dtype(kind).itemsize
        values = np.frombuffer(data, kind, count, entry.start)
        return values.reshape(len(stack.targets), header.spec.rank, width)

    a, b = f"{stack.name}.lora_A", f"{stack.name}.lora_B"
    return header.tensors[a].dtype, bits_of(a, stack.num_in), bits_of(b, stack.num_out)


def _fused_tensors(
    data: FileBytes, header: AdapterHeader, base: BaseInfo
) -> dict[str, TensorBytes]:
    stacks, files = base.stacks_of(header.spec), expert_files(base.architecture)
    dtype, pairs = "", dict[str, Pair]()
    for stack in filter(has_experts, stacks):
        dtype, a_NRI, b_NRO = _stacked(data, header, stack)
        sides = [side.reshape(*stack.grid, *side.shape[1:]) for side in (a_NRI, b_NRO)]
        pairs[stack.name.rpartition(".")[2]] = sides[0], sides[1]
    tensors: dict[str, TensorBytes] = {}
    for module in fused_experts(stacks, alternates=files.alternates):
        layer = {leaf: (a[module.layer], b[module.layer]) for leaf, (a, b) in pairs.items()}
        for name, values in module.join(layer, PREFIX).items():
            tensors[name] = (dtype, values.shape, values.tobytes())
    return tensors


def _without_parameters(
    config: Mapping[str, Any], experts: Experts
) -> tuple[Mapping[str, Any], int]:
    """The settings without those of parameters, and the rank of `gate_up_proj`.

    The names of the tensors say which modules have an adapter, but not that fused ones are of both
    parameters. Raises InvalidRequest for others than these two at rank r, or at 2 r and 2 alpha.
    """
    given = config.get("target_parameters")
    leaves = {"gate_up_proj", "down_proj"} if experts == "fused" else set[str]()
    names = [] if given is None else given
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or {name.rpartition(".")[2] for name in names} - {"weight"} != leaves:
        raise InvalidRequest(
            f"target_parameters={show(given)} (supported: both {PARAMETERS}, and weights)"
        )
    if experts == "each":
        return {**config, "target_parameters": None}, 0
    rank, alpha = config.get("r"), config.get("lora_alpha")
    ranks, alphas = _of_gate_up(config, "rank_pattern"), _of_gate_up(config, "alpha_pattern")
    plain = {**config, "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    if type(rank) is not int or not isinstance(alpha, int | float):
        return plain, 0  # refused with the other settings
    if (ranks, alphas) not in ((None, None), (2 * rank, 2 * alpha)):
        raise InvalidRequest(
            f"gate_up_proj has rank {show(ranks)} and alpha {show(alphas)} "
            f"(supported: as the others, or {2 * rank} and {2 * alpha})"
        )
    return plain, rank if ranks is None else 2 * rank


def _of_gate_up(config: Mapping[str, Any], setting: str) -> Any:
    """What a pattern says of `gate_up_proj`; None without one. Raises InvalidRequest for others."""
    pattern = config.get(setting) or {}
    if not isinstance(pattern, dict) or not all(k.endswith("gate_up_proj") for k in pattern):
        raise InvalidRequest(f"{setting}={show(pattern)} (supported: of gate_up_proj alone)")
    return next(iter(pattern.values()), None)


def _peft_spec(config: Mapping[str, Any], header: Header) -> LoraSpec:
    """Rank and alpha as configured; target groups as the tensors themselves show."""
    odd = [
        f"{key}={show(config[key])} (supported: {plain!r})"
        for key, plain in PLAIN.items()
        if config.get(key) not in (plain, None)
    ]
    if config.get("peft_type", "LORA") != "LORA":
        odd.append(f"peft_type={show(config['peft_type'])} (supported: 'LORA')")
    if str(init := config.get("init_lora_weights")).lower().startswith(BASE_CHANGING_INITS):
        odd.append(f"init_lora_weights={show(init)} (it changes the base; convert it on saving)")
    refuse(odd)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise InvalidRequest("adapter_config.json needs an integer r and a positive lora_alpha")
    groups = {group for name in header.tensors if (group := _group_of(name)) is not None}
    if not groups:
        raise InvalidRequest("the file has no LoRA tensors of attention, MLP or lm_head layers")
    return spec_of(rank, float(alpha), set(groups))


def _group_of(name: str) -> TargetGroup | None:
    if ".self_attn." in name:
        return "attn"
    if ".mlp." in name or ".block_sparse_moe." in name:
        return "mlp"
    return "unembed" if ".lm_head." in name else None
