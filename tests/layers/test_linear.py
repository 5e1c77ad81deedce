"""LoRA linear layers: any mix of adapters equals each token's own plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openmint.kernels.tile import IS_AVAILABLE
from openmint.layers.adapters import (
    AdapterBatch,
    AdapterLayout,
    AdapterStack,
    AdapterWeights,
    GradientSink,
)
from openmint.layers.linear import LoraLinear, TiledLinear, TorchLinear, lora_linear
from openmint.types import LoraSpec, TargetModule

PATHS = ("q", "k", "v")
WIDTHS = (10, 6, 4)
NUM_IN = 12
TARGETS = [TargetModule(p, "attn", NUM_IN, w) for p, w in zip(PATHS, WIDTHS, strict=True)]
OTHER = TargetModule("up", "mlp", NUM_IN, 5)


def fused(dtype: torch.dtype, bias: bool = True) -> LoraLinear:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            path,
            torch.randn(width, NUM_IN, generator=generator).to(dtype),
            torch.randn(width, generator=generator).to(dtype) if bias else None,
        )
        for path, width in zip(PATHS, WIDTHS, strict=True)
    ]
    return TorchLinear("attn", parts)


def adapter(spec: LoraSpec, seed: int, dtype: torch.dtype = torch.float64) -> AdapterWeights:
    targets = [t for t in (*TARGETS, OTHER) if t.group in spec.groups]
    layout = AdapterLayout(spec, targets)
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(layout, torch.randn(layout.num_params, generator=generator).to(dtype))


ADAPTERS = [
    adapter(LoraSpec(1), 1),
    adapter(LoraSpec(5, 10.0), 2),
    adapter(LoraSpec(3, train_attn=False), 3),
    adapter(LoraSpec(8, 1.0, train_mlp=False), 4),
]
SLOTS = torch.tensor([0, 0, 1, -1, 2, 1, 3, 3, 3, -1, 0])


def by_formula(x_TI: Tensor, linear: LoraLinear, adapters: list[AdapterWeights]) -> Tensor:
    """Token by token: W x + b, plus alpha / r * B A x of the token's own adapter."""
    rows = []
    for x_I, slot in zip(x_TI, SLOTS.tolist(), strict=True):
        y_O = linear.forward(x_I[None], None)[0][0]
        views = adapters[slot].views if slot >= 0 else {}
        deltas = []
        for path, width in zip(PATHS, WIDTHS, strict=True):
            if path in views:
                a_RI, b_RO = views[path]
                spec = adapters[slot].spec
                deltas.append(spec.alpha / spec.rank * (b_RO.t() @ (a_RI @ x_I)))
            else:
                deltas.append(torch.zeros(width, dtype=x_I.dtype))
        rows.append(y_O + torch.cat(deltas))
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
def test_mixed_adapters_forward_and_gradients_follow_the_formula(bias: bool) -> None:
    linear = fused(torch.float64, bias)
    x_TI = torch.randn(len(SLOTS), NUM_IN, dtype=torch.float64)
    grad_TO = torch.randn(len(SLOTS), sum(WIDTHS), dtype=torch.float64)
    stack = AdapterStack(ADAPTERS)
    sinks = [torch.zeros_like(each.flat_P) for each in ADAPTERS]
    ours_x = x_TI.clone().requires_grad_()
    out = linear(ours_x, AdapterBatch(stack, SLOTS, GradientSink(stack, sinks)))
    out.backward(grad_TO)

    leaves = [each.flat_P.clone().requires_grad_() for each in ADAPTERS]
    twins = [AdapterWeights(a.layout, leaf) for a, leaf in zip(ADAPTERS, leaves, strict=True)]
    their_x = x_TI.clone().requires_grad_()
    expected = by_formula(their_x, linear, twins)
    expected.backward(grad_TO)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ours_x.grad, their_x.grad)
    for sink, leaf in zip(sinks, leaves, strict=True):
        wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(sink, wanted)
    with torch.no_grad():
        torch.testing.assert_close(linear(x_TI, AdapterBatch(stack, SLOTS)), expected.detach())


def test_one_adapter_for_all_is_the_same_by_the_short_way_and_the_long() -> None:
    linear = fused(torch.float64)
    x_TI = torch.randn(6, NUM_IN, dtype=torch.float64)
    uniform = AdapterBatch(AdapterStack(ADAPTERS[1:2]), torch.zeros(6, dtype=torch.int64))
    delta = uniform.delta("attn", PATHS)
    assert delta is not None
    assert delta.own_TR is None
    among = AdapterBatch(AdapterStack(ADAPTERS), torch.ones(6, dtype=torch.int64))
    torch.testing.assert_close(linear(x_TI, uniform), linear(x_TI, among))


def test_an_adapter_without_this_target_leaves_the_base_alone() -> None:
    linear = fused(torch.float64)
    x_TI = torch.randn(6, NUM_IN, dtype=torch.float64)
    batch = AdapterBatch(AdapterStack(ADAPTERS[2:3]), torch.zeros(6, dtype=torch.int64))
    assert batch.delta(linear.group, linear.paths) is None
    torch.testing.assert_close(linear(x_TI, batch), linear(x_TI, None))


def test_anothers_overflow_does_not_reach_a_neighbour() -> None:
    linear = fused(torch.float64)
    layout = ADAPTERS[0].layout
    wild = AdapterWeights(layout, torch.full_like(ADAPTERS[0].flat_P, 1e300))
    x_TI = 1e10 * torch.ones(3, NUM_IN, dtype=torch.float64)
    batch = AdapterBatch(AdapterStack([wild, ADAPTERS[1]]), torch.tensor([0, 1, -1]))
    out = linear(x_TI, batch)
    assert not out[0].isfinite().all()
    assert out[1:].isfinite().all()


needs_tiles = pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")
TILED_WIDTHS = (72, 8, 64)
TILED_TARGETS = [TargetModule(p, "attn", 48, w) for p, w in zip(PATHS, TILED_WIDTHS, strict=True)]
TILED_SLOTS = torch.tensor([0] * 7 + [1, -1, 2, 1] + [3] * 9 + [-1, 0])


def tiled(bias: bool = True) -> tuple[TiledLinear, TorchLinear]:
    """The same layer as tiles in bfloat16, and by torch in float64."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        (
            path,
            (0.1 * torch.randn(width, 48, generator=generator)).bfloat16(),
            torch.randn(width, generator=generator).bfloat16() if bias else None,
        )
        for path, width in zip(PATHS, TILED_WIDTHS, strict=True)
    ]
    wide = [(p, w.double(), None if b is None else b.double()) for p, w, b in parts]
    return TiledLinear("attn", parts), TorchLinear("attn", wide)


def tiled_adapter(spec: LoraSpec, seed: int) -> AdapterWeights:
    targets = [t for t in (*TILED_TARGETS, OTHER) if t.group in spec.groups]
    layout = AdapterLayout(spec, targets)
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        layout, (0.2 * torch.randn(layout.num_params, generator=generator)).bfloat16()
    )


TILED_ADAPTERS = [
    tiled_adapter(LoraSpec(1), 1),
    tiled_adapter(LoraSpec(5, 10.0), 2),
    tiled_adapter(LoraSpec(3, train_attn=False), 3),
    tiled_adapter(LoraSpec(24, 1.0, train_mlp=False), 4),
]


def trained(
    linear: LoraLinear, x_TI: torch.Tensor, slot_T: torch.Tensor, adapters: list[AdapterWeights]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, gradient of x, and gradients of the adapters, for a seeded gradient of the output."""
    sinks = [torch.zeros(len(each.flat_P)) for each in adapters]
    stack = AdapterStack(adapters)
    x_TI = x_TI.clone().requires_grad_()
    out = linear(x_TI, AdapterBatch(stack, slot_T, GradientSink(stack, sinks)))
    generator = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype))
    assert x_TI.grad is not None
    return out.detach(), x_TI.grad, sinks


@needs_tiles
@pytest.mark.parametrize("bias", [True, False])
def test_tiles_compute_what_torch_does(bias: bool) -> None:
    ours, theirs = tiled(bias)
    x_TI = torch.randn(len(TILED_SLOTS), 48).bfloat16()
    wide = [AdapterWeights(a.layout, a.flat_P.double()) for a in TILED_ADAPTERS]
    out, grad_x, grads = trained(ours, x_TI, TILED_SLOTS, TILED_ADAPTERS)
    their_out, their_grad_x, their_grads = trained(theirs, x_TI.double(), TILED_SLOTS, wide)
    rounding = {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(out.double(), their_out, **rounding)
    torch.testing.assert_close(grad_x.double(), their_grad_x, **rounding)
    for grad, their_grad in zip(grads, their_grads, strict=True):
        assert (grad - their_grad).norm() <= 1e-2 * their_grad.norm()
    torch.testing.assert_close(ours(x_TI, None).double(), theirs(x_TI.double(), None), **rounding)


@needs_tiles
def test_a_row_is_the_same_to_the_bit_whoever_stands_beside_it() -> None:
    linear, _ = tiled()
    x_TI = torch.randn(len(TILED_SLOTS), 48).bfloat16()
    together = linear(x_TI, AdapterBatch(AdapterStack(TILED_ADAPTERS), TILED_SLOTS))
    for row, slot in enumerate(TILED_SLOTS.tolist()):
        own = AdapterStack(TILED_ADAPTERS[slot : slot + 1] if slot >= 0 else [])
        slot_1 = torch.tensor([min(slot, 0)])
        alone = linear(x_TI[row : row + 1], AdapterBatch(own, slot_1) if slot >= 0 else None)
        assert torch.equal(alone[0], together[row])


@needs_tiles
def test_a_mixed_gradient_is_the_solo_gradient() -> None:
    linear, _ = tiled()
    x_TI = torch.randn(16, 48).bfloat16()
    slot_T = torch.tensor([0] * 9 + [1] * 7)
    out, grad_x, grads = trained(linear, x_TI, slot_T, TILED_ADAPTERS[:2])
    linear_alone, _ = tiled()
    sinks = [torch.zeros(len(TILED_ADAPTERS[0].flat_P))]
    stack = AdapterStack(TILED_ADAPTERS[:1])
    x_NI = x_TI[:9].clone().requires_grad_()
    alone = linear_alone(x_NI, AdapterBatch(stack, slot_T[:9], GradientSink(stack, sinks)))
    generator = torch.Generator().manual_seed(9)
    alone.backward(torch.randn(out.shape, generator=generator).bfloat16()[:9])
    assert torch.equal(alone, out[:9])
    assert torch.equal(x_NI.grad, grad_x[:9])
    assert torch.equal(sinks[0], grads[0])


@needs_tiles
def test_in_tiles_anothers_overflow_does_not_reach_a_neighbour() -> None:
    linear, _ = tiled()
    wild = AdapterWeights(TILED_ADAPTERS[0].layout, torch.full_like(TILED_ADAPTERS[0].flat_P, 1e38))
    batch = AdapterBatch(AdapterStack([wild, TILED_ADAPTERS[1]]), torch.tensor([0, 1, -1]))
    out = linear(1e4 * torch.ones(3, 48, dtype=torch.bfloat16), batch)
    assert not out[0].isfinite().all()
    assert out[1:].isfinite().all()


@needs_tiles
def test_an_adapters_size_counts_the_tiles_that_sampling_reads() -> None:
    adapter = TILED_ADAPTERS[3]
    tiles = adapter.tiles(PATHS, "forth")
    attn = sum(view.nbytes for path in PATHS for view in adapter.views[path])
    # Panels of this layer are padded to 64 outputs; those of real layers hardly are.
    assert adapter.num_bytes == adapter.tiles_bytes == adapter.flat_P.nbytes
    assert attn <= tiles.words_W.nbytes <= 2 * attn


def test_weights_of_odd_widths_or_other_dtypes_are_left_to_torch() -> None:
    odd = torch.randn(20, NUM_IN).bfloat16()
    assert isinstance(lora_linear("attn", [("q", odd, None)]), TorchLinear)
    assert isinstance(lora_linear("attn", [("q", torch.randn(16, 16), None)]), TorchLinear)


def test_a_layout_gives_every_parameter_to_one_view() -> None:
    layout = AdapterLayout(LoraSpec(3), (*TARGETS, OTHER))
    flat_P = torch.arange(layout.num_params, dtype=torch.float64)
    parts = [part.flatten() for views in layout.views(flat_P).values() for part in views]
    torch.testing.assert_close(torch.cat(parts).sort().values, flat_P)
    assert all((part.diff() == 1).all() for part in parts)
    layout.views(flat_P)["k"][1].zero_()
    assert int((flat_P == 0).sum()) == 3 * 6 + 1


def test_rows_stand_in_slot_order_for_the_adapters_that_have_the_target() -> None:
    stack = AdapterStack(ADAPTERS)
    assert stack.members("attn") == [0, 1, 3]
    assert stack.row_ranges("attn") == [(0, 0, 1), (1, 1, 6), (3, 6, 14)]
    stacked = stack.stacked(PATHS)
    assert stacked.a_RI.shape == (3 * 14, NUM_IN)
    assert [b_RO.shape for b_RO in stacked.bs_RO] == [(14, 10), (14, 6), (14, 4)]
    for i, path in enumerate(PATHS):
        a_RI, b_RO = ADAPTERS[1].views[path]
        torch.testing.assert_close(stacked.a_RI[stacked.rows(i)][1:6], a_RI)
        torch.testing.assert_close(stacked.bs_RO[i][1:6], b_RO)
