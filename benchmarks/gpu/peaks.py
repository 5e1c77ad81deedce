"""What could this device do at most? By its data sheet, and by two bare operations here and now."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.bench import seconds_of

DATA_SHEETS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
}
"""Dense bf16 FLOP/s and bytes/s of the SXM cards; other builds of the same name are slower."""
TRIES = 5


@dataclass(frozen=True)
class Peaks:
    flops: float
    bytes_per_second: float


def data_sheet(device: str) -> Peaks | None:
    """None for a device that isn't listed."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((Peaks(*peak) for known, peak in DATA_SHEETS.items() if known in name), None)


def measured(device: str, dtype: torch.dtype) -> Peaks:
    """The best of some square matrix products and of some copies; a copy reads and writes."""
    is_gpu = torch.device(device).type == "cuda"
    width, size = (8192, 2**30) if is_gpu else (512, 2**24)
    a = torch.randn(width, width, device=device).to(dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds_of(device, lambda: a @ a)[0] for _ in range(TRIES + 1))
    copy = min(seconds_of(device, lambda: target.copy_(source))[0] for _ in range(TRIES + 1))
    return Peaks(2 * width**3 / product, 2 * size / copy)


def share(value: float, peak: float | None) -> float | None:
    return None if peak is None else value / peak
