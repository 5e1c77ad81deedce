"""Reading a Hugging Face folder's safetensors, tensor by tensor, in the compute precision."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.layers.linear import LoraLinear, lora_linear
from openmint.types import TargetGroup

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights:
    """The tensors of a checkpoint by name; each is read when it is asked for."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises InvalidRequest when the folder holds no safetensors."""
        self._dtype, self._device = dtype, device
        self._files = {name: directory / file for name, file in _index(directory).items()}
        self._handles = {
            path: safe_open(path, framework="pt") for path in set(self._files.values())
        }

    def __getitem__(self, name: str) -> Tensor:
        if (tensor := self.get(name)) is None:
            raise InvalidRequest(f"the checkpoint lacks tensor {name!r}")
        return tensor

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None when the checkpoint has none of that name (an optional bias)."""
        if name not in self._files:
            return None
        tensor: Tensor = self._handles[self._files[name]].get_tensor(name)
        # A copy always: else every page of the mapped file that was read stays in memory too.
        return tensor.to(self._device, self._dtype, copy=True)


class Tensors(Protocol):
    """A checkpoint's tensors by name."""

    def __getitem__(self, name: str) -> Tensor: ...

    def get(self, name: str) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors below one module path, and the layers that they make."""

    weights: Tensors
    path: str
    serves_int8: bool

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self._full(name)]

    def get(self, name: str) -> Tensor | None:
        return self.weights.get(self._full(name))

    def under(self, name: str) -> Module:
        return Module(self.weights, self._full(name), self.serves_int8)

    def linear(self, group: TargetGroup, *names: str) -> LoraLinear:
        """One layer of these, which share an input."""
        parts = [
            (self._full(name), self[f"{name}.weight"], self.get(f"{name}.bias")) for name in names
        ]
        return lora_linear(group, parts, self.serves_int8)

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _index(directory: Path) -> dict[str, str]:
    if (directory / INDEX).is_file():
        index: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
        return index
    if (directory / SINGLE).is_file():
        with safe_open(directory / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    raise InvalidRequest(
        f"{directory} holds neither {SINGLE} nor {INDEX}; "
        "save the model there with `save_pretrained` (safetensors is its default)"
    )
