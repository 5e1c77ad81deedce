"""A layer's experts in one kernel compute, to the bit, what they compute one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openmint.config import WorkerConfig
from openmint.engine.lanes import Lanes
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
from openmint.layers.feed_forward import MixtureOfExperts
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


def adapters_of(model: Any) -> AdapterStack:
    generator, made = torch.Generator().manual_seed(0), []
    for spec in SPECS:
        layout = AdapterLayout(spec, [t for t in model.targets if t.group in spec.groups])
        values_P = 0.1 * torch.randn(layout.num_params, generator=generator)
        made.append(AdapterWeights(layout, values_P.bfloat16()))
    return AdapterStack(made)


def passed(model: Any) -> list[Tensor]:
    """Hidden states, with and without a way back, and the gradient of each adapter."""
    stack, generator = adapters_of(model), torch.Generator().manual_seed(1)
    sinks = [torch.zeros(adapter.layout.num_params) for adapter in stack.adapters]
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


@pytest.mark.parametrize("own", [slice(0, 8), slice(3, 6)], ids=["all", "a rank's"])
@pytest.mark.parametrize("num_threads", [1, 3])
@torch.no_grad()
def test_a_team_serves_what_experts_give_one_by_one_to_the_bit(
    model: Any, num_threads: int, own: slice
) -> None:
    whole = model.layers[-1].feed_forward
    mixture = MixtureOfExperts(whole.router, whole.experts[own], own, whole.shared, 0)
    generator = torch.Generator().manual_seed(2)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    together = Lanes(CPU).together
    torch.set_num_threads(before)
    slot_T = torch.tensor(SLOTS).repeat_interleave(torch.tensor(LENGTHS)).repeat(50)
    for adapters in (None, AdapterBatch(adapters_of(model), slot_T)):
        for rows in (slice(0, 1), slice(0, 4), slice(None)):
            # Many, as a product that isn't rounded before it is added shows in one of 30,000.
            x_TD = torch.randn(len(slot_T), 64, generator=generator).bfloat16()[rows]
            given = adapters and AdapterBatch(adapters.stack, slot_T[rows])
            attention: Any = None  # a mixture sees no other token
            ours = mixture.forward(x_TD, Batch(attention, given, None, together))
            by_one = MixtureOfExperts(whole.router, whole.experts[own], own, whole.shared, 0)
            by_one._tiled = None
            assert torch.equal(ours, by_one.forward(x_TD, Batch(attention, given)))
