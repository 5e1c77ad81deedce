"""A base with one revision folded into its weights: an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.models.embedded import copy_tokenizer

PREFIX, A_SUFFIX, B_SUFFIX = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merge_into_folder(
    base: Path, adapter: Mapping[str, Tensor], scaling: float, target: Path
) -> None:
    """Write `base` with `scaling * B @ A` added, in bf16, and its tokenizer to `target`.

    `adapter` has the names of a PEFT file. Sums are made in fp32 and rounded once. A tied
    output layer that the adapter changes is untied first, so that the embedding stays as it was.
    Raises InvalidRequest when `target` holds files already or a tensor fits no module of the base.
    """
    from transformers import AutoModelForCausalLM

    if target.exists() and any(target.iterdir()):
        raise InvalidRequest(f"{target} is not empty; give a folder that doesn't exist yet")
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True
    )
    paths = module_paths(adapter)
    if "lm_head" in paths and model.config.tie_word_embeddings:
        _untie(model)
    with torch.no_grad():
        for path in paths:
            weight = _weight_of(model, path)
            weight += _update(adapter, path, scaling, weight)
    model.to(torch.bfloat16).save_pretrained(target)
    copy_tokenizer(base, target)


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


def _weight_of(model: torch.nn.Module, path: str) -> Tensor:
    try:
        weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
    except AttributeError:
        raise InvalidRequest(f"the base has no module {path!r} for the adapter's tensors") from None
    return weight


def _update(adapter: Mapping[str, Tensor], path: str, scaling: float, weight: Tensor) -> Tensor:
    A = adapter[PREFIX + path + A_SUFFIX].float()
    B = adapter[PREFIX + path + B_SUFFIX].float()
    if (B.shape[0], A.shape[1]) != tuple(weight.shape) or B.shape[1] != A.shape[0]:
        raise InvalidRequest(
            f"{path}: B {tuple(B.shape)} times A {tuple(A.shape)} doesn't fit {tuple(weight.shape)}"
        )
    return scaling * (B @ A)


def _untie(model: torch.nn.Module) -> None:
    """Give the output layer weights of its own, and say so in the config."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
