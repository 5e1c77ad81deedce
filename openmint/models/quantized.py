"""Checkpoints that are published quantized: each tensor is dequantized as it is read.

A quantized weight is codes and scales; its values are the codes', looked up in a table, times the
scales. Products are float32's and rounded once, or exact. Of a part that is asked for no more
codes and scales are read than it needs, wherever it is cut.

Shapes: E experts, O out, I in, G groups of 32 values along I, B bytes of a group, P and Q rows and
columns of blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from openmint.errors import InvalidRequest
from openmint.models.weights import Weights

METHODS = ("fp8", "mxfp4")
"""Quantizations that are read."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes of MXFP4 without a sign stand for."""
GROUP, GROUP_BYTES = 32, 16
"""Values that share a scale in MXFP4, and their bytes: two to a byte, the first in its low half."""
LARGEST_EXPONENT = 252
"""Of scales of MXFP4: above it 6 would be infinite; 255 stands for no number."""
BAND = 512
"""Rows of an expert that are dequantized at once, so that what is in between stays in caches."""
INTEGERS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}
"""As long as two values."""
LARGEST_FP8 = 448.0
SCALES_OF_FP8 = ("F32", "BF16", "F8_E8M0")


def quantization_of(config: PretrainedConfig) -> str | None:
    """How the checkpoint of this config is quantized; None: it isn't."""
    found = getattr(config, "quantization_config", None)
    return str(found.get("quant_method", "unknown")) if found else None


def dequantized(weights: Weights, config: PretrainedConfig) -> Weights | Dequantized:
    """The checkpoint's tensors as if it weren't quantized.

    Raises InvalidRequest for a quantization that is not read; its tensors do, when they are read,
    where codes and scales don't fit together or scales are no numbers.
    """
    method = quantization_of(config)
    if method is None:
        return weights
    if method == "mxfp4":
        return Dequantized(weights, Mxfp4(weights))
    if method == "fp8":
        return Dequantized(weights, BlockFp8(weights, config.quantization_config))
    raise InvalidRequest(
        f"the checkpoint is quantized by {method!r}, which is not read; {remedy()}"
    )


def remedy() -> str:
    """What to use instead of a quantization that isn't read."""
    return f"use a checkpoint in bfloat16, or one quantized by {' or '.join(METHODS)}"


class Scheme(Protocol):
    """How a checkpoint holds its quantized tensors."""

    @property
    def names(self) -> Collection[str]:
        """All tensors of the checkpoint, as if it weren't quantized."""

    def holds(self, name: str) -> bool:
        """Whether this tensor is a quantized one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the dequantized tensor."""

    def read(self, name: str, cut: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The part of the dequantized tensor. Raises InvalidRequest where it can't be made."""


class Dequantized:
    """The tensors of a quantized checkpoint in the compute precision. What isn't quantized is read
    as it is. `models.weights.Tensors` of a family."""

    def __init__(self, weights: Weights, scheme: Scheme) -> None:
        self._weights, self._scheme = weights, scheme

    @property
    def names(self) -> Collection[str]:
        return self._scheme.names

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, ())

    def get(self, name: str) -> Tensor | None:
        return self.part(name, ()) if self._scheme.holds(name) else self._weights.get(name)

    def exact(self, name: str) -> Tensor:
        if self._scheme.holds(name):
            return self._scheme.read(name, (), torch.float32)
        return self._weights.exact(name)

    def part(self, name: str, cut: tuple[slice, ...]) -> Tensor:
        if self._scheme.holds(name):
            return self._scheme.read(name, cut, self._weights.dtype)
        return self._weights.part(name, cut)

    def shape(self, name: str) -> tuple[int, ...]:
        if self._scheme.holds(name):
            return self._scheme.shape(name)
        return self._weights.shape(name)


class Mxfp4:
    """Stacks of experts in groups of 32 values that share a power of two (OCP Microscaling, 2023).

    `name_blocks [E, O, G, B]` and `name_scales [E, O, G]` are bytes. The tensor that families know
    is `[E, I, O]`, as in the checkpoint that isn't quantized.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    @property
    def names(self) -> Collection[str]:
        stored = (name for name in self._weights.names if not name.endswith("_scales"))
        return {name.removesuffix("_blocks") for name in stored}

    def holds(self, name: str) -> bool:
        return f"{name}_blocks" in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        blocks, scales = (self._weights.shape(f"{name}_{part}") for part in ("blocks", "scales"))
        if len(blocks) != 4 or blocks[-1] != GROUP_BYTES or blocks[:-1] != scales:
            raise InvalidRequest(
                f"{name}_blocks of {list(blocks)} and {name}_scales of {list(scales)} are no "
                f"groups of {GROUP_BYTES} bytes with a scale for each; fetch the checkpoint anew"
            )
        num_experts, num_out, num_groups, _ = blocks
        return num_experts, num_groups * GROUP, num_out

    def read(self, name: str, cut: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        experts, (left, right), rows = spans(cut, self.shape(name))
        groups = slice(left // GROUP, -(-right // GROUP))
        own = slice(left % GROUP, left % GROUP + right - left)
        shape = experts[1] - experts[0], rows[1] - rows[0], right - left
        values_EOI = torch.empty(shape, dtype=dtype, device=self._weights.device)
        for values_OI, expert in zip(values_EOI, range(*experts), strict=True):
            for number, band_OI in enumerate(values_OI.split(BAND)):
                first = rows[0] + number * BAND
                one = slice(expert, expert + 1), slice(first, first + len(band_OI)), groups
                band_OI[:] = self._values(name, one, dtype)[:, own]
        return values_EOI.transpose(1, 2)

    def _values(self, name: str, one: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """Of some rows of one expert `[O, I]`, whole groups."""
        codes_OGB = self._weights.stored(f"{name}_blocks", one)[0]
        exponents_OG = self._weights.stored(f"{name}_scales", one)[0]
        if (exponents_OG > LARGEST_EXPONENT).any():
            raise _no_numbers(f"{name}_scales")
        pairs, powers = _tables(dtype, codes_OGB.device)
        values = pairs.index_select(0, codes_OGB.flatten().int()).view(dtype)
        scales_OG = powers.index_select(0, exponents_OG.flatten().int()).view_as(exponents_OG)
        return values.view(*scales_OG.shape, GROUP).mul_(scales_OG[..., None]).flatten(1)


class BlockFp8:
    """Weights of e4m3 bytes `[O, I]` in blocks that share a scale (DeepSeek-V3, arXiv:2412.19437).

    `name_scale_inv [P, Q]`, called the inverse of what a weight was multiplied with, is what its
    byte is multiplied with. The last blocks may be cut short.
    """

    def __init__(self, weights: Weights, settings: dict[str, Any]) -> None:
        """Raises InvalidRequest for `settings` without the size of blocks."""
        block = settings.get("weight_block_size")
        if not (isinstance(block, list | tuple) and len(block) == 2 and min(block) > 0):
            raise InvalidRequest(
                f"quantization_config of config.json has weight_block_size {block!r}; supported: "
                f"two numbers, as [128, 128]. Else {remedy()}"
            )
        self._weights, self._block = weights, tuple(block)

    @property
    def names(self) -> Collection[str]:
        return [name for name in self._weights.names if not name.endswith("_scale_inv")]

    def holds(self, name: str) -> bool:
        if f"{name}_scale_inv" in self._weights:
            return True
        return name in self._weights and self._weights.kind(name) == "F8_E4M3"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def read(self, name: str, cut: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        self._check(name)
        rows, columns = spans(cut, self.shape(name))
        codes_OI = self._weights.stored(name, (slice(*rows), slice(*columns))).view(torch.uint8)
        codes = torch.arange(256, dtype=torch.uint8, device=codes_OI.device)
        table = codes.view(torch.float8_e4m3fn).float()
        values_OI = torch.empty_like(codes_OI, dtype=dtype)
        (height, width), start = self._block, columns[0] % self._block[1]
        scales_PQ = self._scales(name, rows, columns)
        for number, scales_Q in enumerate(scales_PQ, rows[0] // height):
            band = slice(max(number * height - rows[0], 0), (number + 1) * height - rows[0])
            scales_I = scales_Q.repeat_interleave(width)[start : start + codes_OI.shape[1]]
            values = table.index_select(0, codes_OI[band].flatten().int())
            values_OI[band] = values.view_as(codes_OI[band]).mul_(scales_I)
        return values_OI

    def _scales(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Of the blocks that the part has something of."""
        sides = zip((rows, columns), self._block, strict=True)
        blocks = tuple(slice(first // side, -(-stop // side)) for (first, stop), side in sides)
        scales_PQ = self._weights.stored(f"{name}_scale_inv", blocks).float()
        if not (scales_PQ * LARGEST_FP8).isfinite().all():
            raise _no_numbers(f"{name}_scale_inv")
        return scales_PQ

    def _check(self, name: str) -> None:
        scales = f"{name}_scale_inv"
        kinds = self._weights.kind(name), self._weights.kind(scales)
        if kinds[0] != "F8_E4M3" or kinds[1] not in SCALES_OF_FP8:
            raise InvalidRequest(
                f"{name!r} has scales and holds {kinds[0]}, they {kinds[1]}; supported: F8_E4M3 "
                f"and {', '.join(SCALES_OF_FP8)}. Else {remedy()}"
            )
        shape, found = self.shape(name), self._weights.shape(scales)
        due = tuple(-(-size // side) for size, side in zip(shape, self._block, strict=False))
        if len(shape) != 2 or found != due:
            raise InvalidRequest(
                f"{scales!r} has the shape {list(found)}; {name!r} of {list(shape)} in blocks of "
                f"{list(self._block)}, as config.json says, has {list(due)}: fetch both anew"
            )


def spans(cut: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """From where to where the cut goes in each dimension; all of those that it doesn't name."""
    every = (*cut, *[slice(None)] * (len(shape) - len(cut)))
    return [each.indices(size)[:2] for each, size in zip(every, shape, strict=True)]


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """For MXFP4: each byte's two values, as one integer of their size, for so they are copied at
    once; and each scale's."""
    signed = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=dtype, device=device)
    pairs = torch.stack([signed.repeat(16), signed.repeat_interleave(16)], dim=1)
    powers = [2.0 ** (exponent - 127) for exponent in range(LARGEST_EXPONENT + 1)]
    as_integers = pairs.view(INTEGERS[dtype]).flatten()
    return as_integers, torch.tensor(powers, dtype=dtype, device=device)


def _no_numbers(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name!r} has scales that make weights infinite or no numbers; the file is damaged: "
        "fetch it anew"
    )
