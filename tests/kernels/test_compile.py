"""Compiling ahead covers what training and sampling call: nothing compiles under a request."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmint.kernels import (
    attend,
    dense_step,
    linear,
    logprobs,
    norm,
    paged,
    rotary,
    routed,
    softmax,
    swiglu,
)
from openmint.kernels.compile import compile_kernels
from openmint.kernels.tile import IS_AVAILABLE
from openmint.scheduler.work import TrainWork
from openmint.types import Datum, LoraSpec, LossSpec, RunId, Tenant
from tests.models.test_tiled_dense import saved
from tests.workbench import ALL_FAMILIES, Workbench, random_model

MODULES = (attend, dense_step, linear, logprobs, norm, paged, rotary, routed, softmax, swiglu)
TILED = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16"),
)


def compiled() -> dict[str, int]:
    """How many signatures each kernel has been compiled for."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            inlined = getattr(value, "targetoptions", {}).get("inline") == "always"
            # Pieces are compiled for whoever calls them; kernels are entered from Python.
            is_kernel = getattr(value, "targetoptions", {}).get("nogil", False)
            if is_kernel and not inlined:
                found[f"{module.__name__}.{name}"] = len(value.nopython_signatures)
    return found


@pytest.mark.parametrize("dtype", ["float32", TILED])
def test_work_compiles_nothing_more(dtype: str, tmp_path: Path) -> None:
    compile_kernels(getattr(torch, dtype))
    before = compiled()
    assert len(before) >= 10 and sum(before.values()) >= 10
    base = (saved if dtype == "bfloat16" else random_model)("qwen3", tmp_path / "base")
    bench = Workbench(base, tmp_path / "store", dtype=dtype)
    assert bench.model.is_tiled == (dtype == "bfloat16")
    revision = bench.revision("r", LoraSpec(8), 0)
    tokens = np.arange(3, 12)
    inputs = {"target_tokens": tokens, "weights": np.ones(9, np.float32)}
    data = (Datum(tokens, inputs), Datum(tokens[:4], {k: v[:4] for k, v in inputs.items()}))
    bench.do(TrainWork(RunId("r"), Tenant("t"), data, LossSpec("cross_entropy"), False))
    bench.sample(tokens, revision)
    assert compiled() == before


@pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")
def test_sampling_from_a_mixture_compiles_nothing_more(monkeypatch: Any, tmp_path: Path) -> None:
    compile_kernels(torch.bfloat16)
    before = compiled()
    name, extra = ALL_FAMILIES["qwen3-moe"]
    wide = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}
    monkeypatch.setitem(ALL_FAMILIES, "qwen3-moe", (name, {**extra, **wide}))
    base = random_model("qwen3-moe", tmp_path / "base")
    bench = Workbench(base, tmp_path / "store", dtype="bfloat16")
    bench.sample(np.arange(3, 12), bench.revision("r", LoraSpec(8), 0))
    assert compiled() == before
