"""Grouped products compute what experts compute one by one, with the same gradients."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmint.kernels import choice
from openmint.layers import grouped_experts
from openmint.layers.adapters import (
    AdapterBatch,
    AdapterLayout,
    AdapterStack,
    AdapterWeights,
    GradientSink,
)
from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.layers.feed_forward import GatedFeedForward, MixtureOfExperts
from openmint.layers.linear import TorchLinear
from openmint.layers.router import SoftmaxRouter
from openmint.layers.swiglu import silu_gate
from openmint.models.gpt_oss import clamped_gate
from openmint.types import LoraSpec, TargetModule
from tests.pretend_cuda import DEVICE, pretend_cuda

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

HIDDEN, INNER, EXPERTS, CHOSEN = 32, 16, 6, 2
SPECS = (LoraSpec(3, alpha=6.0), LoraSpec(16), LoraSpec(8, train_mlp=False), LoraSpec(8))
MIXED = torch.tensor([0] * 7 + [1] * 5 + [-1] * 3 + [2] * 4 + [3] * 6)
SLOTS = {
    "none": None,
    "mixed": MIXED,
    "scattered": MIXED[torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(0))],
    "one for all, in place": torch.zeros(25, dtype=torch.int64),
}
CLAMPED = partial(clamped_gate, steepness=1.7, limit=0.5)


class Case:
    """A layer of experts, all of them or some, and adapters of them."""

    def __init__(
        self, own: slice, dtype: torch.dtype, *, biased: bool, device: str = "cpu"
    ) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (0.3 * torch.randn(*shape, generator=draw)).to(device, dtype)

        experts = []
        for number in range(EXPERTS):
            sides = []
            for side, num_in, num_out in (
                ("gate", HIDDEN, INNER),
                ("up", HIDDEN, INNER),
                ("down", INNER, HIDDEN),
            ):
                bias = normal(num_out) if biased else None
                path = f"layers.0.experts.{number}.{side}_proj"
                sides.append((path, normal(num_out, num_in), bias))
            linears = TorchLinear("mlp", sides[:2]), TorchLinear("mlp", sides[2:])
            experts.append(GatedFeedForward(*linears, CLAMPED if biased else silu_gate))
        self.device = torch.device(device)
        router = SoftmaxRouter(normal(EXPERTS, HIDDEN), CHOSEN, True)
        self.mixture = MixtureOfExperts(router, experts[own], own, None, 0)
        other = TargetModule("layers.0.q_proj", "attn", HIDDEN, HIDDEN)
        targets = [other, *(t for linear in self.mixture.linears for t in linear.targets)]
        self.adapters = []
        for spec in SPECS:
            layout = AdapterLayout(spec, [t for t in targets if t.group in spec.groups])
            self.adapters.append(AdapterWeights(layout, normal(layout.num_params)))
        self.x_TD, self.grad_TD = normal(len(MIXED), HIDDEN), normal(len(MIXED), HIDDEN)

    def run(self, slots: str) -> list[Tensor]:
        """Outputs with and without a way back, and all gradients."""
        slot_T = SLOTS[slots]
        adapters = self.adapters[1:2] if slots.startswith("one") else self.adapters
        stack = AdapterStack(adapters)
        sizes = [adapter.layout.num_params for adapter in adapters]
        sinks = [torch.zeros(size, device=self.device) for size in sizes]
        sink, batch = GradientSink(stack, sinks), None
        if slot_T is not None:
            batch = AdapterBatch(stack, slot_T.to(self.device), sink)
        whole = Batch(PackedAttention([len(self.x_TD)], self.device), batch)
        x_TD = self.x_TD.clone().requires_grad_()
        y_TD = self.mixture.forward(x_TD, whole)
        y_TD.backward(self.grad_TD)
        with torch.no_grad():
            again_TD = self.mixture.forward(self.x_TD, whole)
        return [y_TD.detach(), again_TD, x_TD.grad, *sinks]


def check(case: Case, slots: str, tolerance: float) -> None:
    assert case.mixture._grouped is not None
    ours = case.run(slots)
    case.mixture._grouped = None
    theirs = case.run(slots)
    for one, other in zip(ours, theirs, strict=True):
        scale = float(other.float().abs().max()) or 1.0
        assert float((one.float() - other.float()).abs().max()) / scale < tolerance


@pytest.mark.parametrize("own", [slice(0, EXPERTS), slice(2, 5)], ids=["all", "some"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("slots", SLOTS)
def test_they_equal_experts_one_by_one(slots: str, biased: bool, own: slice) -> None:
    check(Case(own, torch.float32, biased=biased), slots, 1e-5)


def test_they_do_so_in_bfloat16() -> None:
    check(Case(slice(0, EXPERTS), torch.bfloat16, biased=False), "scattered", 3e-2)


@pytest.fixture
def interpreted(monkeypatch: Any) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton for its interpreter: make test-kernels")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles its kernels for the GPU here")
    monkeypatch.setattr(choice, "INTERPRETED", True)


@pytest.mark.parametrize("own", [slice(0, EXPERTS), slice(2, 5)], ids=["all", "some"])
@pytest.mark.parametrize("slots", ["scattered", "one for all, in place"])
def test_adapters_read_in_place_equal_experts_one_by_one(
    slots: str, own: slice, interpreted: None, monkeypatch: Any
) -> None:
    case = Case(own, torch.float32, biased=False)
    assert case.mixture._grouped is not None
    ours = case.run(slots)
    monkeypatch.setattr(choice, "INTERPRETED", False)
    case.mixture._grouped = None
    for one, other in zip(ours, case.run(slots), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Waits(TorchDispatchMode):
    """Counts how often the host asks the device for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        to_host = name == "_to_copy" and torch.device((kwargs or {}).get("device", "cuda"))
        is_asked = name in ("_local_scalar_dense", "nonzero", "bincount")
        self.count += is_asked or (to_host and to_host.type == "cpu")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("slots", "count"), [("scattered", 0), ("one for all, in place", 1)])
def test_the_host_waits_in_no_layer(slots: str, count: int, monkeypatch: Any) -> None:
    """On a pretended GPU, forth and back. Once for a batch it asks whether one adapter is all."""
    monkeypatch.setenv("OPENMINT_TRITON", "0")
    with pretend_cuda():
        case = Case(slice(0, EXPERTS), torch.float32, biased=True, device=DEVICE)
        with Waits() as waits:
            case.run(slots)
    assert waits.count == count


def test_no_weight_is_held_twice() -> None:
    mixture = Case(slice(0, EXPERTS), torch.float32, biased=True).mixture
    assert mixture._grouped is not None
    for place, stack in enumerate((mixture._grouped._gate_up, mixture._grouped._down)):
        for expert, own in enumerate(mixture.experts):
            linear = own.linears[place]
            assert isinstance(linear, TorchLinear)
            assert linear.weight_OI.data_ptr() == stack._weight_EOI[expert].data_ptr()
            assert linear.bias_O is not None and stack._bias_EO is not None
            assert linear.bias_O.data_ptr() == stack._bias_EO[expert].data_ptr()


def test_one_adapter_for_all_of_a_whole_rank_is_not_copied() -> None:
    case = Case(slice(0, EXPERTS), torch.float32, biased=False)
    stack = AdapterStack(case.adapters[1:2])
    paths = [f"layers.0.experts.{expert}.up_proj" for expert in range(EXPERTS)]
    for half, one_GRW in enumerate(stack.experts(paths, with_base=False)):
        for expert, path in enumerate(paths):
            own = case.adapters[1].views[path][half]
            assert torch.equal(one_GRW[expert], own)
            assert one_GRW[expert].data_ptr() == own.data_ptr()


def test_anothers_overflow_does_not_reach_a_neighbour() -> None:
    case = Case(slice(0, EXPERTS), torch.float32, biased=False)
    healthy = case.run("scattered")
    case.adapters[1].flat_P.fill_(1e30)
    sick = case.run("scattered")
    others_T = SLOTS["scattered"] != 1
    for one, other in zip(healthy[:3], sick[:3], strict=True):
        assert torch.equal(one[others_T], other[others_T])
    assert torch.equal(healthy[3], sick[3]) and torch.equal(healthy[6], sick[6])


def test_more_groups_than_a_product_takes_are_computed_one_by_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(grouped_experts, "MOST_GROUPS", EXPERTS * len(SPECS))
    case = Case(slice(0, EXPERTS), torch.float32, biased=False)
    assert case.mixture._grouped is not None
    batch = AdapterBatch(AdapterStack(case.adapters), MIXED)
    assert not case.mixture._grouped.takes(batch)
    assert case.mixture._grouped.takes(None)
    check(case, "mixed", 1e-5)


@pytest.mark.parametrize("change", ["dtype", "width"])
def test_what_grouped_products_dont_take_is_computed_one_by_one(change: str) -> None:
    width, dtype = (18, torch.float32) if change == "width" else (16, torch.float64)
    linear = TorchLinear("mlp", [("experts.0.down_proj", torch.ones(16, width).to(dtype), None)])
    assert not grouped_experts.GroupedExperts.suits([linear])
