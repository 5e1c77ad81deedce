"""A layer's experts in one kernel compute, to the bit, what they compute one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openmint.config import WorkerConfig
from openmint.kernels.tile import IS_AVAILABLE
from openmint.layers.adapters import (
    AdapterBatch,
    AdapterLayout,
    AdapterStack,
    AdapterWeights,
    GradientSink,
)
from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.models.loader import load_model
from openmint.types import Digest, LoraSpec
from tests.workbench import ALL_FAMILIES, random_model

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")

CPU = torch.device("cpu")
LENGTHS, SLOTS = (40, 23, 9, 17), (0, 1, 2, -1)
SPECS = (LoraSpec(4), LoraSpec(12), LoraSpec(3, train_mlp=False))
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "moe_intermediate_size": 32,
}


@pytest.fixture(params=["qwen3-moe", "glm4-moe"])
def model(request: pytest.FixtureRequest, monkeypatch: Any, tmp_path: Path) -> Any:
    """Wide enough for tiles."""
    name, extra = ALL_FAMILIES[request.param]
    monkeypatch.setitem(ALL_FAMILIES, request.param, (name, {**extra, **WIDE}))
    folder = random_model(request.param, tmp_path)
    return load_model("m", folder, Digest("sha256:0"), WorkerConfig(dtype="bfloat16"))[0]


def passed(model: Any) -> list[Tensor]:
    """Hidden states, with and without a way back, and the gradient of each adapter."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for spec in SPECS:
        layout = AdapterLayout(spec, [t for t in model.targets if t.group in spec.groups])
        values_P = 0.1 * torch.randn(layout.num_params, generator=generator)
        made.append(AdapterWeights(layout, values_P.bfloat16()))
    stack = AdapterStack(made)
    sinks = [torch.zeros(adapter.layout.num_params) for adapter in made]
    slot_T = torch.tensor(SLOTS).repeat_interleave(torch.tensor(LENGTHS))
    adapters = AdapterBatch(stack, slot_T, GradientSink(stack, sinks))
    tokens_T = torch.randint(0, 160, (sum(LENGTHS),), generator=generator)
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    batch = Batch(PackedAttention(LENGTHS, CPU), adapters)
    hidden_TD = model.forward(tokens_T, positions_T, batch)
    grad_TD = torch.randn(hidden_TD.shape, generator=generator).bfloat16()
    hidden_TD.backward(grad_TD)
    with torch.no_grad():
        again_TD = model.forward(tokens_T, positions_T, batch)
    return [hidden_TD.detach(), again_TD, *sinks]


def test_one_kernel_equals_experts_one_by_one_to_the_bit(model: Any) -> None:
    mixtures = [layer.feed_forward for layer in model.layers if hasattr(layer.feed_forward, "own")]
    assert mixtures and all(mixture._tiled is not None for mixture in mixtures)
    together = passed(model)
    for mixture in mixtures:
        mixture._tiled = None
    for ours, theirs in zip(together, passed(model), strict=True):
        assert torch.equal(ours, theirs)
