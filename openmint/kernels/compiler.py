"""numba and LLVM where they are installed; stand-ins elsewhere, for machines whose bases live on
GPUs."""

from __future__ import annotations

try:
    import llvmlite.binding as llvm
    from llvmlite import ir
    from numba import carray, njit, types  # type: ignore[attr-defined]
    from numba.extending import intrinsic, overload
except ModuleNotFoundError:
    from openmint.kernels.no_compiler import (  # type: ignore[no-redef]
        carray,
        intrinsic,
        ir,
        llvm,
        njit,
        overload,
        types,
    )

__all__ = ["HAS_BF16", "carray", "intrinsic", "ir", "njit", "overload", "types"]


HAS_BF16 = llvm is not None and bool(llvm.get_host_cpu_features().get("avx512bf16", False))
"""Whether this machine has AVX512-BF16."""
