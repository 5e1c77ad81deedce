"""A CUDA device that isn't there: tensors that say `cuda:0`, refuse what a real one's would refuse,
and compute on the CPU.

So the code that other devices than CPUs take is run, and compared, on machines without a GPU: the
references beside the kernels, and every move between host and device. It shows nothing about the
numbers or the speed of a real device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "cuda:0"
MOVES = ("aten.copy_.default",)
"""Operations that may see tensors of both sides."""


class DeviceTensor(Tensor):
    """A tensor of the pretended device. To torch itself it is a meta tensor, which has no memory
    that numpy or a CPU operation could reach by mistake."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )
        made.values = values
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(DEVICE)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class PretendCuda(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operation's result, on the device where a real one would leave it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    wanted = kwargs.get("device")
    stays = bool(on_device) if wanted is None else torch.device(wanted).type in ("cuda", "meta")
    if wanted is None and str(func) not in MOVES:
        strangers = [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim() > 0]
        if on_device and strangers:
            raise RuntimeError(f"{func} got tensors of cuda:0 and of the CPU")
    kwargs = {**kwargs, "device": torch.device("cpu")} if wanted is not None else kwargs
    result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    if func._schema.returns and _is_written(func._schema.returns[0]):
        return args[0] if "out" not in kwargs else kwargs["out"]
    return tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) and stays else x, result)


def _plain(value: Any) -> Any:
    return value.values if isinstance(value, DeviceTensor) else value


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@contextmanager
def pretend_cuda() -> Iterator[None]:
    """Inside, `device="cuda:0"` works. Inference mode is no_grad there: it knows no views of
    tensors of a subclass."""
    modes: list[torch.no_grad] = []

    def enter(_: Any) -> None:
        modes.append(torch.no_grad())
        modes[-1].__enter__()

    def leave(_: Any, *error: Any) -> None:
        modes.pop().__exit__(*error)

    with (
        patch.object(torch.cuda, "_lazy_init", lambda: None),
        patch.object(torch.inference_mode, "__enter__", enter),
        patch.object(torch.inference_mode, "__exit__", leave),
        PretendCuda(),
    ):
        yield
