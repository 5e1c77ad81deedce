"""A base with one revision folded into its weights: an ordinary Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.models.embedded import copy_tokenizer
from openmint.models.loader import architecture_of, read_config
from openmint.models.quantized import dequantized, quantization_of
from openmint.models.weights import Weights

PREFIX, A_SUFFIX, B_SUFFIX = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])")
FUSED = re.compile(r"(.+\.experts)(\.base_layer)?")
"""PEFT's paths of one expert's projection; of all experts' `gate_up_proj`, or `down_proj`."""
USUAL_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

Sides = tuple[Tensor, Tensor]
"""`A [r, in]` and `B [out, r]`."""


def merge_into_folder(
    base: Path, adapter: Mapping[str, Tensor], scaling: float, target: Path
) -> None:
    """Write `base` with `scaling * B @ A` added, in bf16, and its tokenizer to `target`.

    `adapter` has the names of a PEFT file, in either layout of experts. Sums are made in fp32 and
    rounded once. A tied output layer that the adapter changes is untied first, so that the
    embedding stays as it was. What is quantized is dequantized first, and stays so.
    Raises InvalidRequest when `target` holds files already or a tensor fits no module of the base.
    """
    if target.exists() and any(target.iterdir()):
        raise InvalidRequest(f"{target} is not empty; give a folder that doesn't exist yet")
    model = _in_float32(base)
    paths = module_paths(adapter)
    if "lm_head" in paths and model.config.tie_word_embeddings:
        _untie(model)
    with torch.no_grad():
        for path in paths:
            weights = _weights_of(model, path)
            sides = _sides_of(adapter, path, len(weights))
            for weight_OI, (a_RI, b_OR) in zip(weights, sides, strict=True):
                _check_fits(path, weight_OI, a_RI, b_OR)
                weight_OI += scaling * (b_OR @ a_RI)
    # Not `model.to`: a router's bias is a buffer, and stays as exact as it is.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(target)
    copy_tokenizer(base, target)


def _in_float32(base: Path) -> Any:
    """The base's model in `transformers`, dequantized."""
    config = read_config(base)
    if quantization_of(config) is None:
        return transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, local_files_only=True
        )
    tensors = dequantized(Weights(base, torch.float32, torch.device("cpu")), config)
    del config.quantization_config
    model: Any = getattr(transformers, architecture_of(config)).from_pretrained(
        None,
        config=config,
        state_dict={name: tensors[name] for name in tensors.names},
        dtype=torch.float32,
    )
    if (base / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(base)
    return model


def module_paths(adapter: Mapping[str, Tensor]) -> list[str]:
    """Module paths that the adapter changes. Raises InvalidRequest for half a pair."""
    paths = {name.removeprefix(PREFIX).removesuffix(A_SUFFIX) for name in _names(adapter, A_SUFFIX)}
    others = {
        name.removeprefix(PREFIX).removesuffix(B_SUFFIX) for name in _names(adapter, B_SUFFIX)
    }
    if paths != others or len(adapter) != 2 * len(paths):
        odd = sorted(paths ^ others) or sorted(adapter)
        raise InvalidRequest(f"the adapter's tensors don't pair up as lora_A and lora_B: {odd[:3]}")
    return sorted(paths)


def _names(adapter: Mapping[str, Tensor], suffix: str) -> list[str]:
    return [name for name in adapter if name.startswith(PREFIX) and name.endswith(suffix)]


def _weights_of(model: torch.nn.Module, path: str) -> list[Tensor]:
    """The weights `[out, in]` that one A and B of a file change: one, or one for each expert."""
    try:
        if match := EXPERT.fullmatch(path):
            experts = model.get_submodule(match[1].replace("block_sparse_moe", "mlp"))
            return [_projection(experts, int(match[2]), USUAL_NAMES.get(match[3], match[3]))]
        if match := FUSED.fullmatch(path):
            experts = model.get_submodule(match[1])
            name = "gate_up_proj" if match[2] else "down_proj"
            return [_of_expert(experts, name, i) for i in range(len(getattr(experts, name)))]
        return [model.get_submodule(path).weight]  # type: ignore[list-item]
    except (AttributeError, IndexError):
        raise InvalidRequest(f"the base has no module {path!r} for the adapter's tensors") from None


def _projection(experts: torch.nn.Module, expert: int, name: str) -> Tensor:
    if name == "down_proj":
        return _of_expert(experts, name, expert)
    both = _of_expert(experts, "gate_up_proj", expert)
    gate, up = both.chunk(2) if experts.is_concatenated else (both[::2], both[1::2])
    return gate if name == "gate_proj" else up


def _of_expert(experts: torch.nn.Module, name: str, expert: int) -> Tensor:
    """`[out, in]`, however the base has it."""
    weight: Tensor = getattr(experts, name)[expert]
    return weight.t() if experts.is_transposed else weight


def _sides_of(adapter: Mapping[str, Tensor], path: str, count: int) -> Iterator[Sides]:
    """A and B of each of `count` experts, or of one weight."""
    a, b = (adapter[PREFIX + path + suffix].float() for suffix in (A_SUFFIX, B_SUFFIX))
    if len(a) % count or b.shape[1] % count:
        raise InvalidRequest(f"{path}: A and B aren't those of {count} experts")
    # PEFT has an expert's rows of A together, and its columns of B apart.
    return zip(a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).unbind(-1), strict=True)


def _check_fits(path: str, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> None:
    if (len(b_OR), a_RI.shape[1]) != tuple(weight_OI.shape) or b_OR.shape[1] != len(a_RI):
        shapes = tuple(b_OR.shape), tuple(a_RI.shape), tuple(weight_OI.shape)
        raise InvalidRequest("{}: B {} times A {} doesn't fit {}".format(path, *shapes))


def _untie(model: torch.nn.Module) -> None:
    """Give the output layer weights of its own, and say so in the config."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
