"""Are planned bytes real ones? And what would the largest published bases take?

`python -m benchmarks plan`. It times nothing. Small bases are loaded by a worker, whose tensors are
counted, and a mid-size one by a process, whose memory is. Of each large base a layer is written at
full size (sparse files, whose zeros take no disk), and a process loads it as one rank of those that
are planned.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from benchmarks.arms.protocol import versions
from benchmarks.full_size import FULL_SIZE, config_of
from benchmarks.house import Line, Report, number, table, verdict
from benchmarks.processes import Stage
from openmint.config import WorkerConfig
from openmint.errors import InvalidRequest
from openmint.layers import linear
from openmint.models.loader import architecture_of, load_model, read_config
from openmint.models.meta import meta_model
from openmint.models.weights import INDEX
from openmint.plan.base import PlannedBase, planned_base
from openmint.plan.placement import Placement
from openmint.plan.plan import GB, AdapterRoom, KvRoom, Plan, Room, make_plan, size
from openmint.types import Digest, LoraSpec
from tests.held import division_of, measured
from tests.workbench import ALL_FAMILIES, random_model

GPU_GB, GPU_COUNTS, RANKS = 141, (4, 8, 16, 24, 32), (8, 32)
MOST = 5.0
"""Percent by which planned bytes may miss."""
KV_TOKENS, SPEC = 1024, LoraSpec(8)
LARGEST = "Kimi-K2"
ONE_LAYER = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
FILE_BYTES = 10**9
"""After so many the next tensor is in another file."""
MID_SIZE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
}
MEASURED = (
    f"Plans are for GPUs of {GPU_GB} GB, bfloat16 and adapters of rank "
    f"{' and '.join(map(str, RANKS))}. Small bases are random ones of each family in float32, on "
    "one rank: bytes of all tensors that come with the base, with a KV cache of "
    f"{KV_TOKENS} tokens and with a run of rank {SPEC.rank}. Of the mid-size base and of the "
    "layers: memory that a process has to itself, after less before."
)


@dataclass(frozen=True)
class Check:
    """Bytes that were planned, and what they are."""

    what: str
    planned: int
    found: int

    @property
    def error(self) -> float:
        """Percent."""
        return 100 * abs(self.planned / self.found - 1)


Plans = Mapping[int, Plan | str]
"""By number of GPUs; why there is none, where there is none."""


def ask(stage: Stage, repeats: int) -> Report:
    """Neither is needed: nothing is timed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checks = [*small_checks(root / "small"), mid_size_check(root / "mid-size")]
        found: dict[str, Plans] = {}
        for name in FULL_SIZE:
            base = planned(config_of(name, root), "bfloat16")
            found[name] = plans_of(base)
            smallest = next(made for made in found[name].values() if isinstance(made, Plan))
            checks.append(layer_check(name, root / f"{name}-layer", smallest.placement))
            print(f"{name}: planned, and a layer of it read", flush=True)
    return report(checks, found)


def planned(folder: Path, dtype: str) -> PlannedBase:
    return planned_base(folder, dtype, lambda done, of: None)


def plans_of(base: PlannedBase) -> Plans:
    found: dict[int, Plan | str] = {}
    for count in GPU_COUNTS:
        try:
            found[count] = make_plan(base, count, GPU_GB * GB, RANKS)
        except InvalidRequest as error:
            found[count] = error.message
    return found


# -- small bases ----------------------------------------------------------------------------------


def small_checks(root: Path) -> Iterator[Check]:
    """Of every family, in this process."""
    for family in ALL_FAMILIES:
        folder = random_model(family, root / family)
        room = Room(planned(folder, "float32"), Placement(1, 1), GB)
        cache, adapter = KV_TOKENS * room.kv.bytes_per_token, room.adapters(SPEC)
        held = measured(folder, "float32", SPEC, cache)
        yield Check(f"{family}: weights", room.memory.weights_total, held.weights)
        yield Check(f"{family}: KV cache", cache, held.kv_cache)
        yield Check(f"{family}: training run", adapter.run_bytes, held.run)
        yield Check(f"{family}: slot", adapter.slot_bytes, held.slot)


def mid_size_check(folder: Path) -> Check:
    """Of a mixture, in a process of its own."""
    in_a_process(_save_mid_size, folder)
    base = planned(folder, "float32")
    bytes_planned = sum(base.share_bytes(Placement(1, 1)).values())
    what = f"a mixture of {base.num_params / 1e6:.0f} million parameters"
    return Check(what, bytes_planned, in_a_process(_grown_by_loading, folder))


def _save_mid_size(folder: Path) -> None:
    config = transformers.Qwen3MoeConfig(**MID_SIZE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)


def _grown_by_loading(folder: Path) -> int:
    before = own_bytes()
    held = load_model("mid-size", folder, Digest(""), WorkerConfig(dtype="float32"))
    grown = own_bytes() - before
    del held
    return grown


# -- one layer at full size -----------------------------------------------------------------------


def layer_check(name: str, folder: Path, placement: Placement) -> Check:
    """What the last rank of a placement holds of a base that is cut to one layer with experts."""
    config = {**FULL_SIZE[name], **ONE_LAYER}
    config.pop("quantization_config", None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    read = read_config(folder)
    _, reads = meta_model(architecture_of(read), read, torch.bfloat16)
    write_sparse(folder, {read.name: read.shape for read in reads})
    what = f"{name}: a layer on one of {placement.ranks} ranks"
    planned_bytes = sum(planned(folder, "bfloat16").share_bytes(placement).values())
    return Check(what, planned_bytes, in_a_process(_grown_by_a_layer, folder, placement))


def write_sparse(folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A checkpoint of bfloat16 zeros, none of which is on disk."""
    files: list[dict[str, Sequence[int]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * prod(each) for each in files[-1].values()) > FILE_BYTES:
            files.append({})
        files[-1][name] = shape
    found = {}
    for index, tensors in enumerate(files):
        path = folder / f"{index}.safetensors"
        _write_zeros(path, tensors)
        found.update(dict.fromkeys(tensors, path.name))
    (folder / INDEX).write_text(json.dumps({"weight_map": found}))


def _write_zeros(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _grown_by_a_layer(folder: Path, placement: Placement) -> int:
    linear.IS_AVAILABLE = False  # as on a GPU: no weights twice, laid out for either direction
    division = division_of(placement, placement.ranks - 1)
    before = own_bytes()
    held = load_model("layer", folder, Digest(""), WorkerConfig(dtype="bfloat16"), division)
    grown = own_bytes() - before
    del held
    return grown


def own_bytes() -> int:
    """Memory that this process alone has."""
    return int(psutil.Process(os.getpid()).memory_full_info().uss)


def in_a_process(work: Callable[..., Any], *given: Any) -> Any:
    """What `work` says in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system at once
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, given)


# -- the report -----------------------------------------------------------------------------------


def report(checks: Sequence[Check], found: Mapping[str, Plans]) -> Report:
    by_process = [check for check in checks if ": " not in check.what]
    layers = [check for check in checks if "ranks" in check.what]
    small = [check for check in checks if check not in (*by_process, *layers)]
    return Report(
        question="plan",
        title="What bases of up to a trillion parameters take, and whether planned bytes are real",
        measured=MEASURED,
        tables=[
            "## Large bases\n\n" + table([PLAN_HEAD, *_plan_rows(found)]),
            f"## {LARGEST} on one GPU\n\n" + table([RANK_HEAD, *_rank_rows(found[LARGEST])]),
            f"## Adapters of {LARGEST}\n\n" + table([ADAPTER_HEAD, *_adapters(found[LARGEST])]),
            "## Not planned\n\n" + "\n".join(_refusals(found)),
            "## Checks\n\n" + table([CHECK_HEAD, *_check_rows([*by_process, *layers, *small])]),
        ],
        lines=[
            _line("bytes of a worker, all families, largest error", small),
            _line("memory of a process, mid-size base, error", by_process),
            _line("a layer of full size on one rank, largest error", layers),
        ],
        limits=[
            "A full-size layer is loaded by one of the planned ranks, without the others "
            "there; its base has that layer alone, and a vocabulary of 1,024 tokens.",
            "A tenth of each GPU is kept for activations and buffers; they aren't counted.",
            "On CPUs with AVX512-BF16 a bfloat16 base lies in memory twice, once for each "
            "direction of training; the plan is for GPUs, where it doesn't.",
        ],
        data={
            "checks": [{**asdict(check), "error_percent": check.error} for check in checks],
            "plans": {
                name: {count: m if isinstance(m, str) else asdict(m) for count, m in plans.items()}
                for name, plans in found.items()
            },
        },
        versions={"plan": versions(("torch", "transformers", "safetensors"))},
    )


def _line(what: str, checks: Sequence[Check]) -> Line:
    worst = max(check.error for check in checks)
    return Line(f"plan: {what}", f"≤ {MOST:g} %", f"{worst:.3f} %", verdict(worst, at_most=MOST))


PLAN_HEAD = [
    "base",
    "parameters",
    "GPUs",
    "workers",
    "tensor / expert / data parallel",
    "weights a GPU",
    "free a GPU",
    "KV tokens a worker",
    "KV a token and GPU",
    "host memory a token, and for each before it",
    "summed a token",
    "runs of rank 8: attn / + mlp",
]


def _plan_rows(found: Mapping[str, Plans]) -> Iterator[list[str]]:
    for name, plans in found.items():
        for count, made in plans.items():
            if isinstance(made, str):
                yield [name, "", str(count), "doesn't fit", *[""] * (len(PLAN_HEAD) - 4)]
                continue
            place, runs = made.placement, [each.runs for each in made.adapters]
            yield [
                name,
                f"{made.num_params / 1e9:,.1f} billion",
                str(count),
                f"{place.workers} of {place.ranks}",
                f"{place.tensor} / {place.expert} / {place.data}",
                size(made.memory.weights_total),
                size(made.memory.left),
                f"{made.kv.tokens:,}",
                size(made.kv.bytes_per_token),
                _host_memory(made.kv),
                size(made.traffic.sampled_token),
                f"{runs[0]} / {runs[1]}",
            ]


def _host_memory(kv: KvRoom) -> str:
    bits = f" + {kv.index_bits_per_key} bits" if kv.index_bits_per_key else ""
    return f"{size(kv.record_bytes_per_token)}{bits}"


RANK_HEAD = ["GPUs", "what", "size"]


def _rank_rows(plans: Plans) -> Iterator[list[str]]:
    for made in plans.values():
        if isinstance(made, Plan):
            memory = made.memory
            sizes = {**memory.weights, "reserve": memory.reserved}
            parts = ("KV cache", "serving slots", "training")
            sizes |= dict.fromkeys(parts, made.kv.bytes_per_rank)
            for what, num_bytes in sizes.items():
                yield [str(made.gpus), what, size(num_bytes)]


ADAPTER_HEAD = [
    "GPUs",
    "rank",
    "targets",
    "parameters",
    "adapter",
    "slot a GPU",
    "run a GPU",
    "slots",
    "runs",
]


def _adapters(plans: Plans) -> Iterator[list[str]]:
    for made in plans.values():
        if isinstance(made, Plan):
            yield from ([str(made.gpus), *_adapter_row(each)] for each in made.adapters)


def _adapter_row(room: AdapterRoom) -> list[str]:
    sizes = (room.adapter_bytes, room.slot_bytes, room.run_bytes)
    counts = (room.slots, room.runs)
    return [
        str(room.rank),
        ", ".join(room.targets),
        f"{room.num_params / 1e6:,.0f} million",
        *map(size, sizes),
        *map(str, counts),
    ]


def _refusals(found: Mapping[str, Plans]) -> Iterator[str]:
    for plans in found.values():
        for made in plans.values():
            if isinstance(made, str):
                yield f"- {made}."


CHECK_HEAD = ["what", "planned, bytes", "found, bytes", "error, %"]


def _check_rows(checks: Sequence[Check]) -> Iterator[list[str]]:
    for check in checks:
        error = number(check.error)
        yield [check.what, f"{check.planned:,}", f"{check.found:,}", error]
