"""Where a base goes on some GPUs, what each of them then holds, and what fits beside it.

The rest of a GPU's memory, after a reserve and the base, is given to the KV cache, to serving slots
and to training in equal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from openmint.engine.runs import BYTES_PER_PARAM
from openmint.errors import InvalidRequest
from openmint.plan.base import PlannedBase
from openmint.plan.placement import Placement, placements
from openmint.types import LoraSpec, TargetGroup

RESERVE = 0.1
"""Of a GPU's memory: activations, workspaces of kernels, buffers of `torch.distributed`."""
PARTS = 3
"""KV cache, slots and training get one each of what is left."""
LEAST_TOKENS = 8192
"""For so many the KV cache must have room, else a base doesn't fit."""
GATHERED_TIMES = 2
"""A block's weights are there so often at once: as they come, and as they are computed with."""
UPDATE_BYTES = 3 * 4
"""Of each parameter of the run that is updated: its weights and moments once more."""
TARGETS: tuple[tuple[TargetGroup, ...], ...] = (
    ("attn",),
    ("attn", "mlp"),
    ("attn", "mlp", "unembed"),
)
"""What adapters are planned for."""
MOST_GPUS = 4096
MACHINE = 8
"""GPUs that one has."""
GB = 10**9


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one GPU."""

    weights: Mapping[str, int]
    """By what they belong to."""
    weights_total: int
    gathered: int
    """The largest layer's weights, where ranks divide data."""
    reserved: int
    left: int


@dataclass(frozen=True, slots=True)
class KvRoom:
    """Of one worker."""

    bytes_per_token: int
    """On each rank."""
    bytes_per_rank: int
    tokens: int
    record_bytes_per_token: int
    """Of what a token chose, in host memory, on each rank."""
    index_bits_per_key: int
    """And of what indexers chose for it, at most for each earlier token."""


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """Adapters of one rank and one set of targets, on one worker."""

    rank: int
    targets: tuple[TargetGroup, ...]
    num_params: int
    adapter_bytes: int
    """In the precision of the base, as it is stored and kept in host memory."""
    slot_bytes: int
    """Of a serving slot, on each rank."""
    run_bytes: int
    """Of a training run, on each rank: weights, moments and gradient in fp32, and the weights that
    compute."""
    summed_bytes: int
    """Of its gradient, summed over ranks after each backward pass."""
    slots: int
    runs: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a worker's ranks sum (`all_reduce`), in bytes; a ring sends up to twice as much from
    each rank."""

    sums_per_token: int
    """How often, forward."""
    sampled_token: int
    trained_token: int
    """Forward and backward."""
    gathered_per_pass: int
    """Weights that a rank gets from others in a forward or backward pass, and at each step of
    sampling."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it; sizes are in bytes."""

    base: str
    architecture: str
    dtype: str
    num_params: int
    gpus: int
    gpu_bytes: int
    placement: Placement
    memory: RankMemory
    kv: KvRoom
    adapters: tuple[AdapterRoom, ...]
    traffic: Traffic
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Room:
    """What one placement leaves on a GPU of so many bytes."""

    base: PlannedBase
    placement: Placement
    gpu_bytes: int

    @property
    def memory(self) -> RankMemory:
        placement = self.placement
        weights: dict[str, int] = dict(self.base.share_bytes(placement).items())
        gathered = GATHERED_TIMES * self.base.gathered_layer_bytes if placement.data > 1 else 0
        reserved, total = round(RESERVE * self.gpu_bytes), sum(weights.values())
        left = self.gpu_bytes - reserved - total - gathered
        return RankMemory(weights, total, gathered, reserved, left)

    @property
    def part_bytes(self) -> int:
        """For the KV cache, for slots, or for training."""
        return self.memory.left // PARTS

    @property
    def kv(self) -> KvRoom:
        base = self.base
        each = base.token_bytes(self.placement)
        tokens = self.part_bytes // each
        return KvRoom(each, self.part_bytes, tokens, base.record_bytes, base.index_bits)

    def adapters(self, spec: LoraSpec) -> AdapterRoom:
        held, summed = self.base.adapter_values(spec, self.placement)
        itemsize = self.base.itemsize
        slot_bytes = held * itemsize
        run_bytes = held * BYTES_PER_PARAM + (slot_bytes if itemsize < 4 else 0)
        return AdapterRoom(
            rank=spec.rank,
            targets=spec.groups,
            num_params=self.base.info.adapter_params(spec),
            adapter_bytes=self.base.info.adapter_params(spec) * itemsize,
            slot_bytes=slot_bytes,
            run_bytes=run_bytes,
            summed_bytes=4 * summed,
            slots=self.part_bytes // slot_bytes,
            runs=max(0, self.part_bytes - held * UPDATE_BYTES) // run_bytes,
        )

    @property
    def holds_base(self) -> bool:
        return self.part_bytes >= LEAST_TOKENS * self.base.token_bytes(self.placement)

    def trains(self, spec: LoraSpec) -> bool:
        """Whether it holds the base, and a training run and a slot beside it."""
        room = self.adapters(spec) if self.holds_base else None
        return room is not None and room.runs > 0 and room.slots > 0

    @property
    def traffic(self) -> Traffic:
        base, placement = self.base, self.placement
        mixtures = base.num_mixtures if placement.by_tensor or placement.by_expert else 0
        dense = base.num_layers - base.num_mixtures
        sums = mixtures + (base.num_layers + dense if placement.by_tensor else 0)
        once = sums * base.hidden_size * base.itemsize
        others = placement.data - 1
        return Traffic(
            sums_per_token=sums,
            sampled_token=once,
            trained_token=2 * once,
            gathered_per_pass=base.gathered_bytes * others // placement.data,
        )


def specs_of(ranks: Iterable[int]) -> list[LoraSpec]:
    """Adapters of these ranks on each set of targets."""
    return [
        LoraSpec(
            rank,
            train_attn="attn" in groups,
            train_mlp="mlp" in groups,
            train_unembed="unembed" in groups,
        )
        for rank in ranks
        for groups in TARGETS
    ]


def make_plan(base: PlannedBase, gpus: int, gpu_bytes: int, ranks: Sequence[int]) -> Plan:
    """The smallest worker that holds the base, and beside it a training run of each rank on each
    set of targets, or of as many of them as any worker does.

    Raises InvalidRequest, with numbers and what would help, for a base that doesn't fit, and for a
    rank of which not even the smallest run does.
    """
    specs = specs_of(ranks)
    room = _choose(base, gpus, gpu_bytes, specs)
    if room is None:
        raise _too_large(base, gpus, gpu_bytes)
    for rank in ranks:
        own = [spec for spec in specs if spec.rank == rank]
        if not any(room.trains(spec) for spec in own):
            raise InvalidRequest(_no_run(room, own[0], gpus))
    lacking = {spec.rank: spec for spec in reversed(specs) if not room.trains(spec)}
    return Plan(
        base=base.info.name,
        architecture=base.info.architecture,
        dtype=base.info.dtype,
        num_params=base.num_params,
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        placement=room.placement,
        memory=room.memory,
        kv=room.kv,
        adapters=tuple(room.adapters(spec) for spec in specs),
        traffic=room.traffic,
        notes=(
            *base.notes,
            *_notes(room.placement, gpus),
            *(_no_run(room, lacking[rank], gpus) for rank in sorted(lacking)),
        ),
    )


def _notes(placement: Placement, gpus: int) -> list[str]:
    notes = []
    if rest := gpus - placement.workers * placement.ranks:
        notes.append(f"{gpus_of(rest)} of {gpus} left over: the base isn't divided evenly by more")
    if placement.ranks > MACHINE:
        notes.append(f"a worker's ranks are on one machine so far; this one has {placement.ranks}")
    if placement.data > 1:
        notes.append(
            "ranks that divide data gather a layer each time they come to it: for training"
        )
    return notes


def _rooms(base: PlannedBase, gpus: int, gpu_bytes: int, *, by_data: bool) -> list[Room]:
    found = placements(gpus, base.widths)
    return [Room(base, each, gpu_bytes) for each in found if (each.data > 1) == by_data]


def _choose(base: PlannedBase, gpus: int, gpu_bytes: int, specs: Sequence[LoraSpec]) -> Room | None:
    """Of what uses most GPUs. Data are divided only where nothing else holds the base."""
    for by_data in (False, True):
        for used in range(gpus, 0, -1):
            rooms = _rooms(base, used, gpu_bytes, by_data=by_data)
            if holding := [room for room in rooms if room.holds_base]:
                # Of those that train as many, max gives the first, the smallest.
                return max(holding, key=lambda room: sum(room.trains(spec) for spec in specs))
    return None


def _too_large(base: PlannedBase, gpus: int, gpu_bytes: int) -> InvalidRequest:
    rooms = [r for way in (False, True) for r in _rooms(base, gpus, gpu_bytes, by_data=way)]
    best = max(rooms, key=lambda room: room.memory.left)
    memory, beside = best.memory, PARTS * LEAST_TOKENS * best.kv.bytes_per_token
    needed = (memory.weights_total + memory.gathered + beside) / (1 - RESERVE)
    remedy = _remedy(
        gpus,
        gpu_bytes,
        lambda n: any(each.holds_base for each in _rooms(base, n, gpu_bytes, by_data=False)),
    )
    return InvalidRequest(
        f"{base.info.name} ({base.num_params / GB:,.4g} billion parameters in {base.info.dtype}) "
        f"doesn't fit {gpus_of(gpus)} of {gpu_bytes / GB:g} GB: each would hold "
        f"{size(memory.weights_total + memory.gathered)} of weights, wants at least "
        f"{size(beside)} beside them, and has {size(gpu_bytes - memory.reserved)} without its "
        f"reserve of {RESERVE:.0%}. Give {remedy}, or {gpus} of {ceil(needed / GB):,} GB"
    )


def _no_run(room: Room, spec: LoraSpec, gpus: int) -> str:
    found, base = room.adapters(spec), room.base
    remedy = _remedy(
        gpus,
        room.gpu_bytes,
        lambda n: any(each.trains(spec) for each in _rooms(base, n, room.gpu_bytes, by_data=False)),
    )
    update = found.slot_bytes // base.itemsize * UPDATE_BYTES
    return (
        f"no training run of rank {spec.rank} on {', '.join(spec.groups)} fits: it takes "
        f"{size(found.run_bytes + update)} of each GPU, of {size(room.part_bytes)} for training. "
        f"Lower the rank, adapt less, or give {remedy}"
    )


def _remedy(gpus: int, gpu_bytes: int, suffices: Callable[[int], bool]) -> str:
    """How many GPUs would do: up to 8, or whole machines of 8."""
    counts = [*range(gpus + 1, 9), *range(8 * (gpus // 8 + 1), MOST_GPUS + 1, 8)]
    enough = next((count for count in counts if suffices(count)), None)
    if enough is None:
        return "larger GPUs"
    return f"{gpus_of(enough)} of {gpu_bytes / GB:g} GB"


def gpus_of(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def size(num_bytes: int) -> str:
    """Three digits that count, e.g. `1.76 MB`."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = 0 if value >= 99.5 or units[0] == "B" else 1 if value >= 9.95 else 2
    return f"{value:,.{digits}f} {units[0]}"
