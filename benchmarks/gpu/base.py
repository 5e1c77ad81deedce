"""A base of random weights, made on its device from a config, and its tensors by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from transformers import DeepseekV3Config, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from benchmarks.gpu.scale import Scale
from openmint.layers.linear import TorchLinear
from openmint.models.dense import DenseModel
from openmint.models.loader import DTYPES, FAMILIES
from openmint.models.meta import MetaTensors
from openmint.models.weights import Module

SPREAD = 0.02
CONFIGS: dict[str, Any] = {
    "Qwen3ForCausalLM": Qwen3Config,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
    "DeepseekV3ForCausalLM": DeepseekV3Config,
}


class RandomWeights:
    """What `models.weights.Weights` is for a folder: tensors by name, here drawn when asked for, of
    a name always the same."""

    def __init__(
        self, config: PretrainedConfig, dtype: torch.dtype, device: str, seed: int
    ) -> None:
        self._meta = MetaTensors(config, dtype, lambda layer: None)
        self._dtype, self._device, self._seed = dtype, device, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(self._seed + crc32(name.encode()))
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        return made.normal_(0.0, SPREAD, generator=generator)

    def get(self, name: str) -> Tensor | None:
        return None if self._meta.get(name) is None else self[name]

    def exact(self, name: str) -> Tensor:
        return self[name].float()

    def part(self, name: str, cut: tuple[slice, ...]) -> Tensor:
        return self[name][cut]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._meta.shape(name)


def make_weights(scale: Scale, seed: int = 0) -> tuple[RandomWeights, Any]:
    """The tensors of a base of this shape, and its config."""
    config = CONFIGS[scale.shape["architectures"][0]](**scale.shape)
    return RandomWeights(config, DTYPES[scale.dtype], scale.device, seed), config


def make_model(scale: Scale, seed: int = 0) -> tuple[Any, Any]:
    """A base of this shape, and its config."""
    weights, config = make_weights(scale, seed)
    family = FAMILIES[scale.shape["architectures"][0]]
    return family(config, Module(weights, "", serves_int8=False)), config


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
