"""Reading a Hugging Face folder's safetensors, tensor by tensor, in the compute precision."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.layers.gathered import GatheredLinear
from openmint.layers.linear import LoraLinear, PartWeights, lora_linear
from openmint.layers.ranks import UNDIVIDED, WHOLE, Division, Ranks, Split
from openmint.types import TargetGroup

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Numbers that are weights as they are."""


class Weights:
    """The tensors of a checkpoint by name; each is read when it is asked for."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises InvalidRequest when the folder holds no safetensors."""
        self.dtype, self.device = dtype, device
        self._files = {name: directory / file for name, file in _index(directory).items()}
        self._handles = {
            path: safe_open(path, framework="pt") for path in set(self._files.values())
        }

    @property
    def names(self) -> Collection[str]:
        return self._files.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._kept(name)

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None when the checkpoint has none of that name (an optional bias)."""
        return self._kept(name) if name in self else None

    def exact(self, name: str) -> Tensor:
        """The tensor in float32, whatever the compute precision."""
        return self._kept(name, dtype=torch.float32)

    def part(self, name: str, cut: tuple[slice, ...]) -> Tensor:
        """Some rows, or columns, of the tensor; no others are read."""
        return self._kept(name, cut)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """What its numbers are, as safetensors calls it."""
        return str(self._handle(name).get_slice(name).get_dtype())

    def stored(self, name: str, cut: tuple[slice, ...] = ()) -> Tensor:
        """All of the tensor or a part, as the file has it."""
        return self._mapped(name, cut).to(self.device)

    def _kept(
        self, name: str, cut: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        tensor = self._mapped(name, cut)
        if tensor.dtype not in PLAIN:
            raise InvalidRequest(
                f"tensor {name!r} holds {self.kind(name)}, and config.json doesn't say how it is "
                "quantized; use the config.json that it was published with"
            )
        # A copy always: else every page of the mapped file that was read stays in memory too.
        return tensor.to(self.device, dtype or self.dtype, copy=True)

    def _mapped(self, name: str, cut: tuple[slice, ...]) -> Tensor:
        handle = self._handle(name)
        tensor: Tensor = handle.get_slice(name)[cut] if cut else handle.get_tensor(name)
        return tensor

    def _handle(self, name: str) -> Any:
        """The open file that has the tensor."""
        if name not in self:
            raise InvalidRequest(f"the checkpoint lacks tensor {name!r}")
        return self._handles[self._files[name]]


class Tensors(Protocol):
    """A checkpoint's tensors by name."""

    def __getitem__(self, name: str) -> Tensor: ...

    def get(self, name: str) -> Tensor | None: ...

    def exact(self, name: str) -> Tensor: ...

    def part(self, name: str, cut: tuple[slice, ...]) -> Tensor: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors below one module path, and the layers that they make."""

    weights: Tensors
    path: str
    serves_int8: bool
    division: Division = UNDIVIDED
    """Which ranks have which parts of the model."""

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self._full(name)]

    def get(self, name: str) -> Tensor | None:
        return self.weights.get(self._full(name))

    def exact(self, name: str) -> Tensor:
        """In float32: what decides between alternatives isn't rounded."""
        return self.weights.exact(self._full(name))

    def under(self, name: str) -> Module:
        return replace(self, path=self._full(name))

    def part(self, name: str, *cut: slice) -> Tensor:
        """Some rows, columns and so on of the tensor."""
        return self.weights.part(self._full(name), cut)

    def linear(self, group: TargetGroup, *names: str, split: Split = WHOLE) -> LoraLinear:
        """One layer of these, which share an input; this rank's part of it."""
        if self.division.data.size > 1:
            return self._gathered(group, names, self.division.data)
        parts = [
            (self._full(name), self._weight(name, split), self._bias(name, split)) for name in names
        ]
        return lora_linear(group, parts, self.serves_int8, split)

    def made(
        self, group: TargetGroup, parts: Sequence[PartWeights], split: Split = WHOLE
    ) -> LoraLinear:
        """A layer of weights that a family has made from a checkpoint's."""
        ranks = self.division.data
        if ranks.size == 1:
            return lora_linear(group, parts, self.serves_int8, split)
        weight_OI = torch.cat([weight for _, weight, _ in parts])
        own_RI = weight_OI[slice(*GatheredLinear.rows(len(weight_OI), ranks))].clone()
        return GatheredLinear(group, parts, _filled(own_RI, len(weight_OI), ranks), ranks)

    def _gathered(self, group: TargetGroup, names: Sequence[str], ranks: Ranks) -> LoraLinear:
        """`linear` where ranks hold rows of weights; no others are read."""
        shapes = [self.weights.shape(self._full(f"{name}.weight")) for name in names]
        count, start, own = sum(num_out for num_out, _ in shapes), 0, []
        first, stop = GatheredLinear.rows(count, ranks)
        for name, (num_out, _) in zip(names, shapes, strict=True):
            rows = slice(max(first - start, 0), min(stop - start, num_out))
            if rows.start < rows.stop:
                own.append(self.part(f"{name}.weight", rows))
            start += num_out
        own_RI = torch.cat(own) if own else self.part(f"{names[0]}.weight", slice(0, 1))[:0]
        parts = [
            (self._full(name), own_RI.new_empty(1, 1).expand(shape), self.get(f"{name}.bias"))
            for name, shape in zip(names, shapes, strict=True)
        ]
        return GatheredLinear(group, parts, _filled(own_RI, count, ranks), ranks)

    def _weight(self, name: str, split: Split) -> Tensor:
        if split.axis is None:
            return self[f"{name}.weight"]
        num_out, num_in = self.weights.shape(self._full(f"{name}.weight"))
        rows = split.rows(num_out, f"rows of {name}")
        columns = split.columns(num_in, f"columns of {name}")
        return self.part(f"{name}.weight", rows, columns)

    def _bias(self, name: str, split: Split) -> Tensor | None:
        bias_O = self.get(f"{name}.bias")
        if bias_O is None or split.axis is None:
            return bias_O
        if split.axis == "in":  # outputs are summed over ranks, so one of them brings it
            return bias_O if split.ranks.rank == 0 else None
        return bias_O[split.rows(len(bias_O), f"biases of {name}")]

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _filled(own_RI: Tensor, count: int, ranks: Ranks) -> Tensor:
    """As many rows as every rank has; those behind the last are zeros."""
    return F.pad(own_RI, (0, 0, 0, -(-count // ranks.size) - len(own_RI)))


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
