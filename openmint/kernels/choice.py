"""Which way a device computes: numba kernels on CPUs, Triton kernels on GPUs, references elsewhere.

Two environment variables choose the slow way on purpose, to compare, or where a fast one fails:
`OPENMINT_TRITON=0` and `OPENMINT_CUDA_GRAPHS=0`.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

INTERPRETED = False
"""Tests set it, and have Triton run its kernels line by line on the CPU."""


def use_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device. Asked several times a layer."""
    if device.type != "cuda" and not INTERPRETED:
        return False
    return os.environ.get("OPENMINT_TRITON", "1") != "0" and _has_triton()


def use_graphs(device: torch.device) -> bool:
    """Whether decode steps are captured once and replayed; only Triton's can be."""
    wanted = os.environ.get("OPENMINT_CUDA_GRAPHS", "1") != "0"
    return wanted and device.type == "cuda" and use_triton(device)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
