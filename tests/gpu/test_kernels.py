"""The Triton kernels beside their references, interpreted on a CPU or compiled on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu import kernels as suite
from benchmarks.gpu.scale import TINY
from openmint.kernels import norm, rotary, swiglu
from openmint.layers.adapters import (
    AdapterBatch,
    AdapterLayout,
    AdapterStack,
    AdapterWeights,
    GradientSink,
    LoraDelta,
)
from openmint.layers.attention import NO_WINDOW, Heads, KVCache, PagedAttention, PagedGroup, Sight
from openmint.layers.linear import TorchLinear
from openmint.types import LoraSpec, TargetModule
from tests.gpu.conftest import Device

SPECS = [LoraSpec(3), LoraSpec(8, train_attn=False), LoraSpec(20, alpha=8.0), LoraSpec(16)]
WIDTHS = {"odd": (40, 150, 24), "even": (64, 160, 32)}
"""In, and out of two targets: sizes that rule wide loads out, and sizes that allow them."""


def tolerance(dtype: torch.dtype) -> float:
    """Of sums in fp32 that are rounded once where the reference rounds twice."""
    return 2e-5 if dtype == torch.float32 else 2e-2


def dtypes(device: Device) -> list[torch.dtype]:
    """Triton's interpreter multiplies no bf16."""
    half = torch.bfloat16 if device.is_real else torch.float16
    return [torch.float32, half]


class Case:
    """A fused layer of two targets, and adapters that have it or not."""

    def __init__(self, widths: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        self.num_in, *outs = widths
        self.draw = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device
        names = [f"m.{i}" for i in range(len(outs))]
        parts = [
            (name, self.normal(out, self.num_in), None)
            for name, out in zip(names, outs, strict=True)
        ]
        self.linear = TorchLinear("attn", parts)
        targets = [*self.linear.targets, TargetModule("m.up", "mlp", self.num_in, 16)]
        self.adapters = []
        for spec in SPECS:
            layout = AdapterLayout(spec, [t for t in targets if t.group in spec.groups])
            flat_P = self.normal(layout.num_params)
            self.adapters.append(AdapterWeights(layout, flat_P))

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.draw) * 0.3
        return drawn.to(self.device, self.dtype)

    def run(self, slot_T: Tensor, x_TI: Tensor, grad_TO: Tensor) -> tuple[list[Tensor], object]:
        """Output, input gradient and every adapter's gradient, and the way that was taken."""
        stack = AdapterStack(self.adapters)
        sinks = [
            torch.zeros(adapter.layout.num_params, device=self.device) for adapter in self.adapters
        ]
        batch = AdapterBatch(stack, slot_T.to(self.device), GradientSink(stack, sinks))
        y_TO, h = self.linear.forward(x_TI, batch)
        grad_x_TI = self.linear.backward(grad_TO, x_TI, h, batch)
        return [y_TO, grad_x_TI, *sinks], batch.delta("attn", self.linear.paths)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_segments_equal_the_masked_products(
    widths: str, num_tokens: int, triton_device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in dtypes(triton_device):
        case = Case(WIDTHS[widths], dtype, triton_device.name)
        slot_T = torch.randint(-1, len(SPECS), (num_tokens,), generator=case.draw)
        x_TI = case.normal(num_tokens, case.num_in)
        grad_TO = case.normal(num_tokens, case.linear.num_out)
        monkeypatch.setenv("OPENMINT_TRITON", "1")
        ours, way = case.run(slot_T, x_TI, grad_TO)
        assert not isinstance(way, LoraDelta)
        monkeypatch.setenv("OPENMINT_TRITON", "0")
        theirs, way = case.run(slot_T, x_TI, grad_TO)
        assert isinstance(way, LoraDelta)
        for one, other in zip(ours, theirs, strict=True):
            scale = float(other.float().abs().max()) or 1.0
            gap = float((one.float() - other.float()).abs().max()) / scale
            assert gap < tolerance(dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_adapter_that_overflows_stays_alone(triton_device: Device) -> None:
    case = Case(WIDTHS["even"], torch.float32, triton_device.name)
    slot_T = torch.tensor([0, 2, 0, -1, 3, 2])
    x_TI, grad_TO = case.normal(6, case.num_in), case.normal(6, case.linear.num_out)
    healthy, _ = case.run(slot_T, x_TI, grad_TO)
    case.adapters[2].flat_P.fill_(float("inf"))
    sick, _ = case.run(slot_T, x_TI, grad_TO)
    others = (slot_T != 2).to(triton_device.name)
    for one, other in zip(healthy[:2], sick[:2], strict=True):
        torch.testing.assert_close(one[others], other[others], rtol=0, atol=0)
    for slot in (0, 1, 3):
        torch.testing.assert_close(healthy[2 + slot], sick[2 + slot], rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("num_heads", "num_groups", "head_dim"), [(4, 2, 8), (9, 3, 64)])
def test_decoding_over_pages_equals_attention_over_gathered_keys(
    window: int | None,
    with_sinks: bool,
    num_heads: int,
    num_groups: int,
    head_dim: int,
    triton_device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from openmint.layers.decode_attention import DecodeAttention

    at_S, page_tokens, device = np.array([0, 3, 4, 130]), 4, torch.device(triton_device.name)
    pages = [[7], [2], [0, 5], list(range(10, 43))]
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr("openmint.layers.attention.is_plain", lambda q, num_keys: False)
    # The CPU's own kernels, which put keys and values into the reference's pages, know no fp16.
    for dtype in dtypes(triton_device)[: 2 if triton_device.is_real else 1]:
        found = []
        for _ in range(2):
            cache = KVCache(1, 48, page_tokens, num_groups, (head_dim, head_dim), dtype, device)
            draw.manual_seed(1)
            for cached in (cache.keys, cache.values):
                cached.copy_(torch.randn(cached.shape, generator=draw))
            found.append(cache)
        q, k, v = (
            torch.randn(4, heads, head_dim, generator=draw).to(device, dtype)
            for heads in (num_heads, num_groups, num_groups)
        )
        v[1, 0, 0] = float("nan")
        sinks_H = torch.randn(num_heads, generator=draw).to(device, dtype) if with_sinks else None
        heads = Heads(0, head_dim**-0.5, NO_WINDOW if window is None else window, sinks_H)
        ours = DecodeAttention.of(found[0], pages, at_S).attend(heads, q, k, v)
        theirs = gathered(found[1], pages, at_S).attend(heads, q, k, v)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance(dtype))
        torch.testing.assert_close(found[0].keys, found[1].keys, rtol=0, atol=0)
        torch.testing.assert_close(found[0].values, found[1].values, rtol=0, atol=0)


def gathered(cache: KVCache, pages: list[list[int]], at_S: np.ndarray) -> PagedAttention:
    """The reference on the same pages."""
    device, size = cache.keys.device, cache.page_tokens
    longest = max(map(len, pages))
    pages_SP = np.array([[*own, *[0] * (longest - len(own))] for own in pages])
    slot_S = pages_SP[np.arange(len(at_S)), at_S // size] * size + at_S % size
    rows_S1 = torch.arange(len(at_S), device=device)[:, None]
    real_S1 = torch.ones_like(rows_S1, dtype=torch.bool)
    group = PagedGroup(rows_S1, real_S1, pages_SP, Sight(at_S[:, None], device))
    return PagedAttention(cache, slot_S, [group])


def test_padding_writes_nothing_and_reads_what_is_finite(triton_device: Device) -> None:
    from openmint.layers.decode_attention import DecodeAttention

    device = torch.device(triton_device.name)
    cache = KVCache(1, 4, 4, 2, (16, 16), torch.float32, device)
    q, k, v = (torch.ones(2, heads, 16, device=device) for heads in (4, 2, 2))
    whole = DecodeAttention.of(cache, [[3], [1]], np.array([2, 0]))
    whole.place_S[1] = -1
    out_SW = whole.attend(Heads(0, 0.25), q, k, v)
    assert bool(torch.isfinite(out_SW).all())
    written = cache.keys[0].flatten(0, 1).abs().sum((1, 2)).nonzero().flatten().tolist()
    assert written == [3 * 4 + 2]


@pytest.mark.parametrize("width", [8, 96, 128])
def test_fused_operations_equal_their_references(width: int, triton_device: Device) -> None:
    from openmint.kernels import fused_decode

    draw = torch.Generator().manual_seed(0)
    for dtype in dtypes(triton_device):
        x_TW, weight_D, angle_TD = (
            torch.randn(*shape, generator=draw).to(triton_device.name, dtype)
            for shape in ((5, 4 * width), (width,), (5, width // 2))
        )
        x_TW[0, 0] = 30.0
        heads_THD = x_TW.unflatten(1, (4, width))
        cos_TD, sin_TD = (x.repeat(1, 2) for x in (angle_TD.cos(), angle_TD.sin()))
        pairs = [
            (fused_decode.rms_norm(heads_THD, weight_D, 1e-5), norm, (heads_THD, weight_D, 1e-5)),
            (fused_decode.silu_gate(x_TW), swiglu, (x_TW,)),
            (fused_decode.rotate(x_TW, cos_TD, sin_TD, 3), rotary, (x_TW, cos_TD, sin_TD, 3)),
        ]
        for ours, module, arguments in pairs:
            theirs = module.reference(*arguments)
            torch.testing.assert_close(ours, theirs, rtol=tolerance(dtype), atol=tolerance(dtype))


def test_the_suites_own_comparison_runs_and_agrees(triton_device: Device) -> None:
    if triton_device.is_real:
        pytest.skip("benchmarks/gpu/run.sh asks this at full size")
    rows = list(suite.rows(TINY))
    assert all(row["agrees"] for row in rows)
    assert {row["table"] for row in rows} == {"kernels", "decode of two layers"}


def test_what_the_suite_compares_runs_by_references_anywhere() -> None:
    for work in {**suite.adapter_works(TINY), **suite.small_works(TINY)}.values():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in work())
