"""The devices that the tests of this folder run on: a real one, and two stand-ins for CI.

`pretended`: the references, on tensors that say `cuda:0` (`tests/pretend_cuda.py`).
`interpreted`: the Triton kernels, line by line on CPU tensors; skipped where Triton isn't installed
(`pip install triton`; it is no dependency on CPUs).
`cuda` and `cuda, references`: the same tests on a GPU, marked `gpu`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch

from openmint.kernels import choice
from tests.pretend_cuda import DEVICE, pretend_cuda

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported


@dataclass(frozen=True)
class Device:
    name: str
    """What `worker.device` says."""
    active: Callable[[], AbstractContextManager[None]]
    """The engine's work on the device stands inside."""
    tolerance: float
    """Of fp32 log-probabilities against the CPU's."""

    @property
    def is_real(self) -> bool:
        return torch.device(self.name).type == "cuda" and self.name != DEVICE


def on_gpu(kind: str) -> object:
    return pytest.param(kind, marks=pytest.mark.gpu)


ALL = ["pretended", "interpreted", on_gpu("cuda"), on_gpu("cuda, references")]
WITH_TRITON = ["interpreted", on_gpu("cuda")]


@pytest.fixture(params=ALL)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    return make_device(request.param, monkeypatch)


@pytest.fixture(params=WITH_TRITON)
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    return make_device(request.param, monkeypatch)


def make_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> Device:
    if kind.startswith("cuda"):
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA: torch finds no device")
        if kind != "cuda":
            monkeypatch.setenv("OPENMINT_TRITON", "0")
        return Device("cuda", nullcontext, 1e-3)
    if kind == "pretended":
        monkeypatch.setenv("OPENMINT_TRITON", "0")
        return Device(DEVICE, pretend_cuda, 1e-4)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton for its interpreter: make test-kernels")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles its kernels for the GPU here")
    monkeypatch.setattr(choice, "INTERPRETED", True)
    return Device("cpu", nullcontext, 1e-4)
