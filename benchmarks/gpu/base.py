"""A base of random weights, made on its device from a config, and its tensors by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from benchmarks.gpu.scale import Scale
from openmint.layers.linear import TorchLinear
from openmint.models.dense import DenseModel
from openmint.models.loader import DTYPES
from openmint.models.weights import Module

SPREAD = 0.02


class RandomWeights:
    """What `models.weights.Weights` is for a folder: tensors by name, here drawn when asked for."""

    def __init__(self, config: Qwen3Config, dtype: torch.dtype, device: str, seed: int) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        return made.normal_(0.0, SPREAD, generator=self._generator)

    def get(self, name: str) -> Tensor | None:
        return None if name.endswith(".bias") else self[name]

    def exact(self, name: str) -> Tensor:
        return self[name].float()

    def part(self, name: str, cut: tuple[slice, ...]) -> Tensor:
        return self[name][cut]

    def shape(self, name: str) -> tuple[int, ...]:
        config: Any = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        return {
            "embed_tokens": (config.vocab_size, hidden),
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
            "q_norm": (config.head_dim,),
            "k_norm": (config.head_dim,),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "norm": (hidden,),
        }[name.split(".")[-2]]


def make_model(scale: Scale, seed: int = 0) -> tuple[DenseModel, Qwen3Config]:
    config = Qwen3Config(**scale.shape)
    weights: Any = RandomWeights(config, DTYPES[scale.dtype], scale.device, seed)
    return DenseModel(config, Module(weights, "", serves_int8=False)), config


def named_tensors(model: DenseModel) -> dict[str, Tensor]:
    """The base's own memory by its Hugging Face names: who writes there changes the live model."""
    tensors = {
        "model.embed_tokens.weight": model.embedding_VD,
        "model.norm.weight": model.final_norm_D,
    }
    for linear in model.linears:
        assert isinstance(linear, TorchLinear), "here no weight is laid out for a CPU"
        weight_OI = linear.weight_OI
        for part in linear.parts:
            tensors[f"{part.path}.weight"] = weight_OI[part.start : part.stop]
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}"
        tensors[f"{prefix}.input_layernorm.weight"] = layer.input_norm_D
        tensors[f"{prefix}.post_attention_layernorm.weight"] = layer.feed_forward_norm_D
        tensors[f"{prefix}.self_attn.q_norm.weight"] = layer.attention.q_norm_D
        tensors[f"{prefix}.self_attn.k_norm.weight"] = layer.attention.k_norm_D
    return tensors


def save_folder(tensors: dict[str, Tensor], config: Qwen3Config, folder: Path) -> int:
    """A Hugging Face folder of these tensors; the bytes of its weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    return path.stat().st_size
