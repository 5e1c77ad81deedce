"""How long does a large MoE adapter take from its file to where an engine reads it?

`python -m benchmarks packed`. The same values twice: in our file, of one tensor per projection over
all layers and experts, and in PEFT's, of one per expert. Read, checked, built, and copied into the
buffers of a slot that is there already; with the file in the page cache, and without.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, table, verdict
from benchmarks.processes import THREADS, Stage
from openmint.engine.formats import decode_revision, encode_revision
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.store.folder_store import FolderStore
from openmint.store.peft_file import PREFIX, to_peft
from openmint.types import BaseInfo, Digest, LoraSpec, TargetModule, stacks_of

NUM_LAYERS, NUM_EXPERTS = 48, 128
HIDDEN, INNER, HEADS, HEADS_KV = 2048, 768, 4096, 512
"""Qwen3-30B-A3B's (config.json of Qwen/Qwen3-30B-A3B)."""
SPEC = LoraSpec(1, train_unembed=False)
AT_LEAST = 8.7
"""MinT's figure for the live load (arXiv 2605.13779)."""
PHASES, CACHES = ("read", "build", "register"), ("warm", "cold")
Phases = Mapping[str, float]
MEASURED = (
    f"A rank-1 adapter of Qwen3-30B-A3B's shape ({NUM_LAYERS} layers of {NUM_EXPERTS} experts), "
    "bf16, random values. Ours, as a worker loads it: *read* the file and hash it against its "
    "digest, *build* the vector (header checked against the base, all values finite; a view of "
    "what was read), *register* it in a slot (one copy). One by one: *read* the file, *build* a "
    "tensor for each A and B by the safetensors library, *register* each in its place in the "
    "slot's buffers, B transposed; nothing is checked. Both slots hold the same bytes afterwards, "
    "which is checked."
)


def base_info() -> BaseInfo:
    """What a worker would say of the base; nobody loads it."""
    digest, stacks = Digest("sha256:" + "30" * 32), stacks_of(targets())
    return BaseInfo(
        *("Qwen/Qwen3-30B-A3B", digest, "Qwen3MoeForCausalLM", "", "bfloat16", "cpu"),
        *(151_936, 40_960, (), 0, 0, 64, stacks),
    )


def targets() -> Iterator[TargetModule]:
    attention = {
        "q_proj": (HIDDEN, HEADS),
        "k_proj": (HIDDEN, HEADS_KV),
        "v_proj": (HIDDEN, HEADS_KV),
        "o_proj": (HEADS, HIDDEN),
    }
    expert = {
        "gate_proj": (HIDDEN, INNER),
        "up_proj": (HIDDEN, INNER),
        "down_proj": (INNER, HIDDEN),
    }
    for layer in range(NUM_LAYERS):
        at = f"model.layers.{layer}"
        for name, widths in attention.items():
            yield TargetModule(f"{at}.self_attn.{name}", "attn", *widths)
        for e in range(NUM_EXPERTS):
            for name, widths in expert.items():
                yield TargetModule(f"{at}.mlp.experts.{e}.{name}", "mlp", *widths)


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started_at = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started_at


class Loads:
    """The adapter in both files, and a slot's buffers."""

    def __init__(self, folder: Path) -> None:
        base = base_info()
        layout = AdapterLayout(SPEC, base.targets_of(SPEC))
        flat_P = torch.empty(layout.num_params, dtype=torch.bfloat16)
        flat_P.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
        data = encode_revision(AdapterWeights(layout, flat_P), base)
        self._base, self._layout = base, layout
        self._blobs = FolderStore(folder)
        self.digest = self._blobs.put(data)
        (self.packed_file,) = (path for path in folder.rglob("*") if path.stat().st_size > 1 << 26)
        self.single_file = folder / "adapter_model.safetensors"
        self.single_file.write_bytes(to_peft(data, base)["adapter_model.safetensors"])
        with self.single_file.open("rb") as file:
            os.fsync(file.fileno())
        self.slot_P = torch.zeros_like(flat_P)
        views = layout.views(self.slot_P)
        self._places = {
            f"{PREFIX}{path}.{name}.weight": place
            for path, (a_RI, b_RO) in views.items()
            for name, place in (("lora_A", a_RI), ("lora_B", b_RO.T))
        }
        self.num_single, self.num_packed = len(self._places), 2 * len(base.stacks_of(SPEC))
        self._expected_P = flat_P

    def packed(self) -> Phases:
        clock = Clock()
        with clock.phase("read"):
            data = self._blobs.get(self.digest)
        with clock.phase("build"):
            weights = decode_revision(data, self._base, self.digest, lambda _: self._layout)
        with clock.phase("register"):
            self.slot_P.copy_(weights.flat_P)
        return clock.seconds

    def single(self) -> Phases:
        clock = Clock()
        with clock.phase("read"):
            data = self.single_file.read_bytes()
        with clock.phase("build"):
            tensors = safetensors.torch.load(data)
        with clock.phase("register"):
            for name, tensor in tensors.items():
                self._places[name].copy_(tensor)
        return clock.seconds

    def check(self) -> None:
        """Assert that the slot holds the adapter, and empty it."""
        assert torch.equal(self.slot_P.view(torch.int16), self._expected_P.view(torch.int16))
        self.slot_P.zero_()


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(loads: Loads, repeats: int) -> dict[str, list[Phases]]:
    """By arm, a load per repeat; the arms take turns after one each to warm up."""
    arms: dict[str, tuple[Callable[[], Phases], Path]] = {
        "packed": (loads.packed, loads.packed_file),
        "one by one": (loads.single, loads.single_file),
    }
    found: dict[str, list[Phases]] = {f"{arm}, {cache}": [] for cache in CACHES for arm in arms}
    for lap in range(-1, repeats):
        for cache in CACHES:
            for arm, (load, file) in arms.items():
                if cache == "cold":
                    forget(file)
                phases = load()
                loads.check()
                if lap >= 0:
                    found[f"{arm}, {cache}"].append(phases)
    return found


def total(phases: Phases) -> float:
    return sum(phases.values())


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: both arms are in this process."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        loads = Loads(Path(folder))
        sizes = loads.packed_file.stat().st_size, loads.single_file.stat().st_size
        found = measure(loads, repeats)
    return report(found, (loads.num_packed, loads.num_single), sizes)


def report(
    found: Mapping[str, Sequence[Phases]], counts: tuple[int, int], sizes: tuple[int, int]
) -> Report:
    rows = [
        [
            name,
            *(_milliseconds([each[phase] for each in of]) for phase in PHASES),
            _milliseconds([total(each) for each in of]),
        ]
        for name, of in found.items()
    ]
    lines = []
    for cache in CACHES:
        pairs = zip(found[f"one by one, {cache}"], found[f"packed, {cache}"], strict=True)
        spread = Spread.of([total(single) / total(packed) for single, packed in pairs])
        work = f"packed adapter: live load, {cache} page cache, against one tensor per expert"
        lines.append(
            Line(work, f"≥ {AT_LEAST:g}x", spread.show("x"), verdict(spread.median, AT_LEAST))
        )
    return Report(
        question="packed",
        title="A 30B-shaped MoE adapter from its file to a slot",
        measured=MEASURED,
        tables=[
            table([["load", *(f"{phase}, ms" for phase in PHASES), "together, ms"], *rows]),
            table(
                [
                    ["file", "tensors", "MB"],
                    ["packed", str(counts[0]), f"{sizes[0] / 1e6:.1f}"],
                    ["one by one", f"{counts[1]:,}", f"{sizes[1] / 1e6:.1f}"],
                ]
            ),
        ],
        lines=lines,
        limits=[
            "The slot is a buffer, laid out as an engine's. The base itself is not loaded.",
            "Cold means that the kernel was told to drop the file; the disk may have a cache too.",
        ],
        data={name: [dict(each) for each in of] for name, of in found.items()},
        versions={"loads": versions(("torch", "safetensors", "numpy"))},
    )


def _milliseconds(seconds: Sequence[float]) -> str:
    return Spread.of([1e3 * each for each in seconds]).show()
