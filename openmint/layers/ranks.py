"""Ranks: processes that compute one model together, each with its part of it.

A divided part of a model begins with `enter` and ends with `leave`. In between a rank computes with
its own weights alone, so `leave` sums what all of them found, and on the way back `enter` does. All
gradients in between are shares of a sum too, those of adapters included (`shards.py` says which).

Nothing here is global: ranks are made where a worker starts and handed down to the layers.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from openmint.errors import InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that compute together. With one of them nothing is sent."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A `torch.distributed` process group."""
    device: str = "cpu"
    """Where tensors must be for the group to send them."""

    def enter(self, x: Tensor) -> Tensor:
        """`x`, which all ranks have; its gradient is the sum of theirs."""
        if self.size == 1 or not x.requires_grad:
            return x
        out: Tensor = _Enter.apply(x, self)
        return out

    def leave(self, y: Tensor) -> Tensor:
        """The sum of the ranks' `y`; each gets its whole gradient. Without autograd `y` is used
        up."""
        if self.size == 1:
            return y
        if y.requires_grad:
            out: Tensor = _Leave.apply(y, self)
            return out
        return self.sum_(y.contiguous())

    def sum_(self, x: Tensor) -> Tensor:
        """`x` replaced by its sum over ranks, which is the same to the bit on all of them."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def total(self, value: float) -> float:
        """The sum of every rank's value."""
        if self.size == 1:
            return value
        return float(self.sum_(torch.tensor([value], dtype=torch.float64, device=self.device)))

    def agree(self, is_so: bool) -> bool:
        """Whether it is so on every rank."""
        return self.total(float(is_so)) == self.size

    def gather(self, x_F: Tensor) -> Tensor:
        """Every rank's vector, all of one length, as rows `[N, F]`."""
        all_NF = x_F.new_empty(self.size, len(x_F))
        dist.all_gather(list(all_NF.unbind()), x_F.contiguous(), group=self.group)
        return all_NF

    def gather_values(self, value: T) -> list[T]:
        """Every rank's value, of any kind."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def part(self, count: int, what: str) -> slice:
        """Which of `count` things are this rank's: as many on each.

        Raises InvalidRequest, which calls them `what`, if that can't be.
        """
        if count % self.size:
            raise InvalidRequest(
                f"{count} {what} can't be divided among {self.size} ranks; "
                f"give a number of ranks that divides {count}"
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


ALONE = Ranks()
PATIENCE_SECONDS = 300.0
"""A rank that waits longer for the others fails. They only wait within a step, never between."""


def meet(rank: int, size: int, meeting: Path, device: str) -> Ranks:
    """This process among `size` on this machine, once all have come to the same file, which is
    new."""
    if device == "cpu" and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=dist.FileStore(str(meeting), size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE_SECONDS),
    )
    return Ranks(rank, size, dist.group.WORLD, device)


@dataclass(frozen=True, slots=True)
class Division:
    """Among which ranks what is divided; either all of the worker's or one alone."""

    tensor: Ranks = ALONE
    """Each has some of every layer's heads and feed-forward columns."""
    experts: Ranks = ALONE
    """Each has some of the experts."""
    data: Ranks = ALONE
    """Each trains some of the data and holds some rows of every weight."""

    @property
    def world(self) -> Ranks:
        """All of the worker's ranks."""
        return max((self.tensor, self.experts, self.data), key=lambda ranks: ranks.size)

    @property
    def mixture(self) -> Ranks:
        """Those that divide a layer of experts, one way or the other."""
        return self.experts if self.experts.size > 1 else self.tensor


UNDIVIDED = Division()


@dataclass(frozen=True, slots=True)
class Split:
    """How the weight of a linear layer is divided: by outputs, by inputs, or not at all in a part
    of the model that is divided otherwise."""

    axis: Literal["out", "in"] | None = None
    ranks: Ranks = ALONE

    def rows(self, count: int, what: str) -> slice:
        """Which of the weight's rows this rank has."""
        return self.ranks.part(count, what) if self.axis == "out" else slice(0, count)

    def columns(self, count: int, what: str) -> slice:
        return self.ranks.part(count, what) if self.axis == "in" else slice(0, count)


WHOLE = Split()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum_(y.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
