"""A base without weights: the family's own code over tensors of torch's meta device, which have a
shape and no memory.

It answers what a base of this config would hold, for configs far larger than this machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from openmint.errors import InvalidRequest
from openmint.layers.ranks import UNDIVIDED, Division
from openmint.models.decoder import Decoder
from openmint.models.loader import FAMILIES
from openmint.models.mixture import usual_name
from openmint.models.weights import Module
from openmint.types import LAYER

ONE_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor that a family took out of its checkpoint, and so holds."""

    name: str
    shape: tuple[int, ...]
    """Of what it took."""
    itemsize: int
    """Bytes of a value."""


class MetaTensors:
    """The tensors of a config's checkpoint, shapes alone; `reads` has each one that was asked for,
    as often as it was. `models.weights.Tensors` of a family."""

    def __init__(
        self, config: PretrainedConfig, dtype: torch.dtype, note_layer: Callable[[int], None]
    ) -> None:
        """`note_layer` hears of each layer whose tensors come next."""
        self._dtype, self._note_layer, self._layer = dtype, note_layer, -1
        self.shapes = shapes_of(config)
        self.reads: list[Read] = []

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, self.shape(name))

    def get(self, name: str) -> Tensor | None:
        shape = self._shape(name)
        return None if shape is None else self._read(name, shape)

    def exact(self, name: str) -> Tensor:
        return self._read(name, self.shape(name), torch.float32)

    def part(self, name: str, cut: tuple[slice, ...]) -> Tensor:
        shape = list(self.shape(name))
        for dim, rows in enumerate(cut):
            shape[dim] = len(range(*rows.indices(shape[dim])))
        return self._read(name, tuple(shape))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        if (shape := self._shape(name)) is None:
            raise InvalidRequest(f"a checkpoint of this config lacks tensor {name!r}")
        return shape

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        self._watch(name)
        dtype = dtype or self._dtype
        self.reads.append(Read(name, shape, dtype.itemsize))
        return torch.empty(shape, dtype=dtype, device="meta")

    def _shape(self, name: str) -> tuple[int, ...] | None:
        name = usual_name(name)
        if (shape := self.shapes.get(name)) is not None:
            return shape
        expert = ONE_EXPERT.fullmatch(name)
        if expert is None:
            return None
        side = "down_proj" if expert[3] == "down" else "gate_up_proj"
        stack = self.shapes.get(f"{expert[1]}.{side}")
        if stack is None or int(expert[2]) >= stack[0]:
            return None
        num_out = stack[1] if side == "down_proj" else stack[1] // 2
        return num_out, stack[2]

    def _watch(self, name: str) -> None:
        match = LAYER.match(name)
        if match and int(match[1]) != self._layer:
            self._layer = int(match[1])
            self._note_layer(self._layer)


def shapes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of `transformers`' model of this config: experts stacked, whatever the checkpoint
    has. Raises InvalidRequest where it has no such model."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequest(f"transformers builds no model of this config: {reason}") from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def meta_model(
    architecture: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    note_layer: Callable[[int], None] = lambda layer: None,
    division: Division = UNDIVIDED,
) -> tuple[Decoder, list[Read]]:
    """The family's model of this config, or one rank's part of it, without memory; and the tensors
    that it holds.

    Raises InvalidRequest for what the family doesn't compute, or can't divide so.
    """
    tensors = MetaTensors(config, dtype, note_layer)
    model = FAMILIES[architecture](config, Module(tensors, "", False, division))
    assert isinstance(model, Decoder)
    return model, tensors.reads
