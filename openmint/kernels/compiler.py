"""numba and LLVM where they are installed; stand-ins elsewhere, for machines whose bases live on
GPUs."""

from __future__ import annotations

try:
    import llvmlite.binding as llvm
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic, overload
except ModuleNotFoundError:
    from openmint.kernels.no_compiler import (  # type: ignore[no-redef]
        intrinsic,
        ir,
        llvm,
        njit,
        overload,
        types,
    )

__all__ = ["cpu_has", "intrinsic", "ir", "njit", "overload", "types"]


def cpu_has(feature: str) -> bool:
    """Whether kernels may use an instruction set of this machine, by LLVM's name of it."""
    return llvm is not None and bool(llvm.get_host_cpu_features().get(feature, False))
