"""Compiling ahead covers what training and sampling call: nothing compiles under a request."""

from pathlib import Path

import numpy as np
import torch

from openmint.kernels import logprobs, norm, paged, rotary, softmax, swiglu
from openmint.kernels.compile import compile_kernels
from openmint.scheduler.work import TrainWork
from openmint.types import Datum, LoraSpec, LossSpec, RunId, Tenant
from tests.workbench import Workbench, random_model


def compiled() -> dict[str, int]:
    """How many signatures each kernel has been compiled for."""
    found = {}
    for module in (logprobs, norm, paged, rotary, softmax, swiglu):
        for name, value in vars(module).items():
            inlined = getattr(value, "targetoptions", {}).get("inline") == "always"
            if hasattr(value, "nopython_signatures") and not inlined:
                found[f"{module.__name__}.{name}"] = len(value.nopython_signatures)
    return found


def test_work_compiles_nothing_more(tmp_path: Path) -> None:
    compile_kernels(torch.float32)
    before = compiled()
    assert len(before) >= 10 and min(before.values()) >= 1
    bench = Workbench(random_model("qwen3", tmp_path / "base"), tmp_path / "store")
    revision = bench.revision("r", LoraSpec(4), 0)
    tokens = np.arange(3, 12)
    inputs = {"target_tokens": tokens, "weights": np.ones(9, np.float32)}
    data = (Datum(tokens, inputs), Datum(tokens[:4], {k: v[:4] for k, v in inputs.items()}))
    bench.do(TrainWork(RunId("r"), Tenant("t"), data, LossSpec("cross_entropy"), False))
    bench.sample(tokens, revision)
    assert compiled() == before
