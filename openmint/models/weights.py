"""Reading a Hugging Face folder's safetensors, tensor by tensor, in the compute precision."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from openmint.errors import InvalidRequest

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
