"""Do the Triton kernels agree with the references on this device, and what do they spare?

Where they don't, the questions after this one run on the references.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.base import make_model
from benchmarks.gpu.bench import MadeAdapters, make_bench, prompts, seconds_of
from benchmarks.gpu.decode import generate
from benchmarks.gpu.scale import Scale
from benchmarks.in_process import DIGEST
from openmint.config import WorkerConfig
from openmint.kernels.choice import use_triton
from openmint.layers.adapters import AdapterBatch, AdapterStack, GradientSink
from openmint.layers.linear import LoraLinear
from openmint.layers.norm import rms_norm
from openmint.layers.rotary import Angles, rotate
from openmint.layers.swiglu import silu_gate
from openmint.models.loader import DTYPES, describe
from openmint.types import LoraSpec

TITLE = "Kernels beside their references"
MEASURED = (
    "Each kernel and its reference on the same random values of the model's widths, 64 tokens of "
    "eight adapters and the base; the gap is the largest one over the largest value. Then a model "
    "of two layers decodes with either: the gap is that of log-probabilities. Times are medians "
    "with their launches, without a graph. A kernel that disagrees, or breaks, has the questions "
    "after this one run with OPENMINT_TRITON=0."
)
SWITCH = "OPENMINT_TRITON"
NUM_TOKENS, NUM_ADAPTERS = 64, 8
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
LOGPROB_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    if not use_triton(torch.device(scale.device)):
        yield {"table": "kernels", "kernel": "none on this device: the references run"}
        return
    for name, work in {**adapter_works(scale), **small_works(scale)}.items():
        yield {"table": "kernels", "kernel": name, **compare(scale, work)}
    yield {"table": "decode of two layers", **decode_both_ways(scale, SWITCH)}


def compare(scale: Scale, work: Callable[[], list[Tensor]]) -> dict[str, Any]:
    """The work by kernel and by reference."""
    found, micros = [], []
    for setting in ("1", "0"):
        with switched(SWITCH, setting):
            found.append(work())
            laps = [seconds_of(scale.device, work)[0] for _ in range(scale.repeats)]
            micros.append(1e6 * statistics.median(laps))
    gap = max(relative(*pair) for pair in zip(*found, strict=True))
    agrees = gap <= BOUNDS[DTYPES[scale.dtype]]
    return {"gap": gap, "agrees": agrees, "kernel, µs": micros[0], "reference, µs": micros[1]}


def relative(ours: Tensor, theirs: Tensor) -> float:
    largest = float(theirs.float().abs().max())
    return float((ours.float() - theirs.float()).abs().max()) / (largest or 1.0)


@contextmanager
def switched(variable: str, setting: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = setting
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def adapter_works(scale: Scale) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of one layer's linears with many adapters."""
    model, config = make_model(with_layers(scale, 1))
    worker = WorkerConfig(device=scale.device, dtype=scale.dtype)
    base = describe(model, config, worker, name="", digest=DIGEST, directory="")
    made = MadeAdapters(LoraSpec(scale.rank, train_unembed=False), base)
    adapters = [made.load_revision(made.digest(1 + i)) for i in range(NUM_ADAPTERS)]
    works = {}
    for linear in model.linears:
        num_out = linear.num_out
        x_TI, grad_TO = random_rows(scale, linear.num_in), random_rows(scale, num_out)
        name = " ".join(part.path.rsplit(".", 1)[-1] for part in linear.parts)
        works[f"adapters of {name}"] = partial(
            through, linear, AdapterStack(adapters), x_TI, grad_TO
        )
    return works


def through(linear: LoraLinear, stack: AdapterStack, x_TI: Tensor, grad_TO: Tensor) -> list[Tensor]:
    """Output, input gradient and adapter gradients."""
    slot_T = torch.arange(NUM_TOKENS, device=x_TI.device) % (NUM_ADAPTERS + 1) - 1
    sinks = [torch.zeros_like(a.flat_P, dtype=torch.float32) for a in stack.adapters]
    batch = AdapterBatch(stack, slot_T, GradientSink(stack, sinks))
    y_TO, h = linear.forward(x_TI, batch)
    return [y_TO, linear.backward(grad_TO, x_TI, h, batch), *sinks]


def small_works(scale: Scale) -> dict[str, Callable[[], list[Tensor]]]:
    """The operations between the products."""
    shape, dtype = scale.shape, DTYPES[scale.dtype]
    head_dim, num_q = shape["head_dim"], shape["num_attention_heads"]
    num_heads = num_q + 2 * shape["num_key_value_heads"]
    hidden, gate_up = shape["hidden_size"], 2 * shape["intermediate_size"]
    x_TD, gate_up_TW = random_rows(scale, hidden), random_rows(scale, gate_up)
    heads_TW = random_rows(scale, num_heads * head_dim)
    weight_D = torch.ones(hidden, dtype=dtype, device=scale.device)
    angle_TD = random_rows(scale, head_dim // 2).repeat(1, 2)
    angles = Angles(angle_TD.cos(), angle_TD.sin())
    turn = partial(rotate, heads_TW, angles, num_q, angle_TD.shape[1])
    return {
        "norm": lambda: [rms_norm(x_TD, weight_D, 1e-6)],
        "activation": lambda: [silu_gate(gate_up_TW)],
        "rotary": lambda: list(turn()),
    }


def random_rows(scale: Scale, width: int) -> Tensor:
    return torch.randn(NUM_TOKENS, width, device=scale.device).to(DTYPES[scale.dtype])


def with_layers(scale: Scale, num_layers: int) -> Scale:
    return replace(scale, shape={**scale.shape, "num_hidden_layers": num_layers})


def decode_both_ways(scale: Scale, variable: str) -> dict[str, Any]:
    """Sequences of several adapters by a model of two layers, with a switch on and off."""
    size, small = scale.decoding, with_layers(scale, 2)
    spec, batch = LoraSpec(scale.rank, train_unembed=False), min(8, max(size.batches))
    digests = [MadeAdapters.digest(1 + i) if i % 3 else None for i in range(batch)]
    logprobs, steps = [], []
    for setting in ("1", "0"):
        with switched(variable, setting):
            bench = make_bench(small, partial(MadeAdapters, spec), kv_cache_bytes=2**28)
            for seed in (0, 1):  # the first time compiles and captures
                rows_ST = prompts(batch, size.tokens_in, bench.base.vocab_size, seed)
                log, results = generate(bench, rows_ST, size.tokens_out, digests)
            seconds, drawn = log.decode
            steps.append(1000 * seconds / (drawn / batch))
            # The first two tokens: one from the prompt's step, one decoded.
            logprobs.append([s.logprobs_N[:2] for result in results for s in result.sequences])
    gap = max(float(abs(a - b).max()) for a, b in zip(*logprobs, strict=True))
    agrees = gap <= LOGPROB_BOUNDS[DTYPES[scale.dtype]]
    return {"gap": gap, "agrees": agrees, "on, ms a step": steps[0], "off, ms a step": steps[1]}
