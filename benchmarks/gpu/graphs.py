"""Do captured decode steps give what plain ones give, and what do they spare?

Where they don't, the questions after this one run without graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.kernels import decode_both_ways
from benchmarks.gpu.scale import Scale
from openmint.kernels.choice import use_graphs

TITLE = "Decode as a CUDA graph"
MEASURED = (
    "A model of two layers decodes sequences of several adapters and of the base, with graphs and "
    "without; the gap is that of log-probabilities. Where they disagree, or break, the questions "
    "after this one run with OPENMINT_CUDA_GRAPHS=0."
)
SWITCH = "OPENMINT_CUDA_GRAPHS"


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    if not use_graphs(torch.device(scale.device)):
        yield {"table": "graphs", "graphs": "none on this device: every step is launched"}
        return
    yield {"table": "graphs", **decode_both_ways(scale, SWITCH)}
