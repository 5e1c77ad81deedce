"""Stands in for numba where it isn't installed: kernels can be defined, but not run.

Devices other than CPUs run the references beside the kernels, so their machines need no numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

types: Any = None
ir: Any = None
llvm: Any = None
carray: Any = None
"""Kernels name them inside functions that nobody calls."""


def njit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., NoReturn]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., NoReturn]:
        def refuse(*arguments: Any) -> NoReturn:
            raise RuntimeError(
                f"the CPU kernel {function.__name__} needs numba: `pip install numba`, "
                'or let the base live on a GPU (worker.device = "cuda")'
            )

        return refuse

    return decorate


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def overload(function: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    return lambda implementation: implementation
