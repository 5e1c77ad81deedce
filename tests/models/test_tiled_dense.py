"""The step kernel computes what the layers compute, to the bit, and both follow `transformers`."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from openmint.config import WorkerConfig
from openmint.engine.lanes import Lanes
from openmint.kernels.team import Together, alone
from openmint.kernels.tile import IS_AVAILABLE
from openmint.layers.adapters import (
    AdapterBatch,
    AdapterLayout,
    AdapterStack,
    AdapterWeights,
    GradientSink,
)
from openmint.layers.attention import PackedAttention, TiledCache, TiledPages
from openmint.layers.batch import Batch
from openmint.models.loader import load_model
from openmint.models.model import Model
from openmint.types import Digest, LoraSpec
from tests.workbench import FAMILIES, reference

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="this CPU has no AVX512-BF16")

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LENGTHS = (23, 1, 40, 17, 9)
LONGER = (150, 1, 67, 70)
SLOTS = (0, -1, 1, 2, 1)
MILD = (LoraSpec(1, 1.0), LoraSpec(20, 10.0, train_mlp=False), LoraSpec(8, 4.0, train_attn=False))
"""Small enough that rounding isn't blown up on the way through the layers."""
SPECS = (LoraSpec(1), LoraSpec(20, 10.0, train_mlp=False), LoraSpec(8, train_attn=False))
CPU = torch.device("cpu")
HIDDEN: list[weakref.ref[Tensor]] = []
"""What forward passes gave."""
HEAP_WATCH = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
"""glibc's own; it ends a process that wrote where it had no memory."""


def saved(family: str, directory: Path) -> Path:
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**extra, **SHAPE})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(directory)
    return directory


def loaded(directory: Path) -> Model:
    model, _ = load_model("m", directory, Digest("sha256:0"), WorkerConfig(dtype="bfloat16"))
    assert model.is_tiled
    return model


def adapters_of(
    model: Model, specs: Sequence[LoraSpec] = SPECS, dtype: torch.dtype = torch.bfloat16
) -> AdapterStack:
    made = []
    for seed, spec in enumerate(specs):
        layout = AdapterLayout(spec, [t for t in model.targets if t.group in spec.groups])
        generator = torch.Generator().manual_seed(seed)
        values_P = 0.1 * torch.randn(layout.num_params, generator=generator)
        made.append(AdapterWeights(layout, values_P.bfloat16().to(dtype)))
    return AdapterStack(made)


def rows_of(tokens: list[Tensor], stops: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and slots of whole sequences, packed."""
    slots = [torch.full((stop,), slot) for stop, slot in zip(stops, SLOTS, strict=True)]
    return torch.cat(tokens), torch.cat([torch.arange(n) for n in stops]), torch.cat(slots)


def by_layers(model: Model, tokens: list[Tensor], stack: AdapterStack | None) -> Tensor:
    tokens_T, positions_T, slot_T = rows_of(tokens, list(LENGTHS))
    batch = Batch(PackedAttention(LENGTHS, CPU), AdapterBatch(stack, slot_T) if stack else None)
    with torch.no_grad():
        return model.forward(tokens_T, positions_T, batch)


def by_steps(
    model: Model, tokens: list[Tensor], stack: AdapterStack | None, together: Together
) -> Tensor:
    """The same in ragged chunks over shuffled pages."""
    numbers = np.random.default_rng(7)
    shape = model.cache_shape
    cache = TiledCache(shape.num_layers, 24, 16, shape.num_kv_heads, shape.key_width)
    cache.keys_LB[:] = numbers.integers(0, 0x7F00, cache.keys_LB.shape)  # an earlier owner's
    cache.values_LB[:] = numbers.integers(0, 0x4F00, cache.values_LB.shape)
    pages_SP = numbers.permutation(24)[: 3 * len(LENGTHS)].reshape(len(LENGTHS), 3)
    out: list[list[Tensor]] = [[] for _ in LENGTHS]
    done = [0] * len(LENGTHS)
    while any(at < length for at, length in zip(done, LENGTHS, strict=True)):
        going = [i for i, at in enumerate(done) if at < LENGTHS[i] and numbers.random() < 0.7]
        if not going:
            continue
        sizes = [int(numbers.integers(1, LENGTHS[i] - done[i] + 1)) for i in going]
        spans = [(i, done[i], done[i] + n) for i, n in zip(going, sizes, strict=True)]
        tokens_T = torch.cat([tokens[i][a:b] for i, a, b in spans])
        at_T = torch.cat([torch.arange(a, b) for _, a, b in spans])
        slot_T = torch.cat([torch.full((b - a,), SLOTS[i]) for i, a, b in spans])
        sequence_T = np.repeat(np.arange(len(going)), sizes)
        pages = TiledPages(cache, sequence_T, cache.blocks(pages_SP[going]), together)
        with torch.no_grad():
            batch = AdapterBatch(stack, slot_T) if stack else None
            hidden = model.sample(tokens_T, at_T, pages, batch)
        for i, n, part in zip(going, sizes, hidden.split(sizes), strict=True):
            out[i].append(part)
            done[i] += n
    return torch.cat([part for parts in out for part in parts])


@pytest.fixture
def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 160, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapters"])
def test_a_step_equals_the_layers_to_the_bit(
    family: str, adapted: bool, tokens: list[Tensor], tmp_path: Path
) -> None:
    model = loaded(saved(family, tmp_path))
    stack = adapters_of(model) if adapted else None
    expected = by_layers(model, tokens, stack)
    assert torch.equal(by_steps(model, tokens, stack, alone), expected)
    assert torch.equal(by_steps(model, tokens, stack, Lanes(CPU).together), expected)
    if adapted:
        assert not torch.equal(expected, by_layers(model, tokens, None))


@pytest.mark.parametrize("family", FAMILIES)
def test_tiled_logits_follow_transformers(
    family: str, tokens: list[Tensor], tmp_path: Path
) -> None:
    model = loaded(saved(family, tmp_path))
    with torch.no_grad():
        ours = model.head(by_steps(model, tokens, None, alone), None).float()
        twin: Any = reference(tmp_path).bfloat16().float()
        theirs = torch.cat([twin(row[None]).logits[0] for row in tokens])
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def gradients(model: Model, lengths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Of all adapters, for seeded tokens and gradients of the final hidden states, which come last.
    A sequence's seed is its place."""
    stack = adapters_of(model, MILD, dtype)
    width = model.head.num_in
    seeds = [torch.Generator().manual_seed(place) for place in range(len(lengths))]
    pairs = list(zip(seeds, lengths, strict=True))
    tokens_T = torch.cat([torch.randint(0, 160, (n,), generator=seed) for seed, n in pairs])
    grad_TD = torch.cat([torch.randn(n, width, generator=seed).bfloat16() for seed, n in pairs])
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    slot_T = torch.cat([torch.full((n,), slot) for n, slot in zip(lengths, SLOTS, strict=False)])
    sinks = [torch.zeros(adapter.layout.num_params) for adapter in stack.adapters]
    adapters = AdapterBatch(stack, slot_T, GradientSink(stack, sinks))
    batch = Batch(PackedAttention(lengths, CPU), adapters)
    hidden_TD = model.forward(tokens_T, positions_T, batch)
    hidden_TD.backward(grad_TD.to(dtype))
    HIDDEN.append(weakref.ref(hidden_TD))
    return [*sinks, hidden_TD.detach().float()]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_follow_autograd_in_float32(family: str, tmp_path: Path) -> None:
    ours = gradients(loaded(saved(family, tmp_path)), LONGER, torch.bfloat16)
    exact, _ = load_model("m", tmp_path, Digest("sha256:0"), WorkerConfig(dtype="float32"))
    for own, their in zip(ours, gradients(exact, LONGER, torch.float32), strict=True):
        assert float((own - their).norm()) <= 2e-2 * float(their.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_bit_whoever_stands_beside(
    family: str, tmp_path: Path
) -> None:
    model = loaded(saved(family, tmp_path))
    beside, by_itself = (gradients(model, n, torch.bfloat16)[0] for n in (LONGER, LONGER[:1]))
    assert by_itself.abs().max() > 0
    assert torch.equal(beside, by_itself)


def test_nothing_of_a_step_outlives_it(tmp_path: Path) -> None:
    gradients(loaded(saved("llama", tmp_path)), LONGER, torch.bfloat16)
    assert HIDDEN[-1]() is None


@pytest.mark.skipif(not HEAP_WATCH.exists(), reason="no checking allocator on this machine")
def test_steps_beside_each_other_write_only_to_memory_that_is_theirs(tmp_path: Path) -> None:
    saved("qwen3", tmp_path)
    watched = {"LD_PRELOAD": str(HEAP_WATCH), "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    command = [sys.executable, "-c", BESIDE_EACH_OTHER, str(tmp_path)]
    ran = subprocess.run(
        command, env={**os.environ, **watched}, capture_output=True, text=True, timeout=300
    )
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


BESIDE_EACH_OTHER = """
import sys, threading
from pathlib import Path
import torch
from openmint.kernels.team import alone
from tests.models.test_tiled_dense import LENGTHS, LONGER, adapters_of, by_steps, gradients, loaded
torch.set_num_threads(1)
model = loaded(Path(sys.argv[1]))
tokens = [torch.arange(n) for n in LENGTHS]
def train():
    for _ in range(10):
        gradients(model, LONGER, torch.bfloat16)
def sample():
    for _ in range(10):
        by_steps(model, tokens, adapters_of(model), alone)
threads = [threading.Thread(target=each) for each in (train, sample, train)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
"""
