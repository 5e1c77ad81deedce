"""What a plan chooses, what it says fits, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.full_size import config_of
from openmint.errors import InvalidRequest
from openmint.plan.base import PlannedBase, planned_base
from openmint.plan.placement import Placement, placements
from openmint.plan.plan import GB, LEAST_TOKENS, PARTS, RESERVE, Plan, Room, make_plan
from openmint.types import LoraSpec
from tests.workbench import random_model

RANK = 4
ALL = LoraSpec(RANK)


def roomy(base: PlannedBase) -> PlannedBase:
    """Without most of its KV cache, which in a tiny base is far more than all else."""
    return replace(
        base, cache=replace(base.cache, num_layers=1, num_kv_heads=2, key_width=1, value_width=1)
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> PlannedBase:
    """8 experts, 4 heads of queries and 2 of keys."""
    folder = random_model("qwen3-moe", tmp_path_factory.mktemp("mixture"))
    return roomy(planned_base(folder, "bfloat16", lambda done, of: None))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> PlannedBase:
    folder = random_model("qwen3", tmp_path_factory.mktemp("dense"))
    return roomy(planned_base(folder, "bfloat16", lambda done, of: None))


def enough_for(base: PlannedBase, placement: Placement, spec: LoraSpec | None = None) -> int:
    """Memory of a GPU on which a placement just holds the base, and a run of this spec."""
    room = Room(base, placement, 0)
    needs = LEAST_TOKENS * room.kv.bytes_per_token
    if spec:
        values, _ = base.adapter_values(spec, placement)
        needs = max(needs, values * (16 + 2 + 12))
    held = room.memory.weights_total + room.memory.gathered
    return round((held + PARTS * needs) / (1 - RESERVE)) + 2 * PARTS


def plan(base: PlannedBase, gpus: int, gpu_bytes: int, ranks: tuple[int, ...] = (RANK,)) -> Plan:
    return make_plan(base, gpus, gpu_bytes, ranks)


def test_one_gpu_that_suffices_is_a_worker_and_each_further_one_another(
    mixture: PlannedBase,
) -> None:
    gpu_bytes = enough_for(mixture, Placement(1, 1), ALL)
    made = plan(mixture, 4, gpu_bytes)
    assert made.placement == Placement(4, 1)
    assert made.traffic.sums_per_token == 0
    assert [(each.runs >= 1, each.slots >= 1) for each in made.adapters] == [(True, True)] * 3


def test_the_smallest_worker_that_holds_the_base_is_taken(mixture: PlannedBase) -> None:
    for ranks in (2, 4):
        ways = [
            each for each in placements(4, mixture.widths) if each.ranks == ranks and each.data == 1
        ]
        gpu_bytes = min(enough_for(mixture, each, ALL) for each in ways)
        assert plan(mixture, 4, gpu_bytes).placement.ranks == ranks


def test_a_worker_that_also_trains_is_preferred_to_a_smaller_one(mixture: PlannedBase) -> None:
    gpu_bytes = enough_for(mixture, Placement(4, 1))
    assert not Room(mixture, Placement(4, 1), gpu_bytes).trains(ALL)
    assert plan(mixture, 4, gpu_bytes).placement.ranks > 1


def test_gpus_that_divide_nothing_are_left_over(mixture: PlannedBase) -> None:
    gpu_bytes = enough_for(mixture, Placement(1, 2, expert=2))
    made = plan(mixture, 3, gpu_bytes, ())
    assert (made.placement.workers, made.placement.ranks) == (1, 2)
    assert "1 GPU of 3 left over" in made.notes[-1]
    assert made.gpus == 3


def test_a_base_that_does_not_fit_is_refused_and_the_remedies_work(mixture: PlannedBase) -> None:
    gpu_bytes = enough_for(mixture, Placement(1, 4, expert=4))
    with pytest.raises(InvalidRequest, match="doesn't fit 1 GPU of") as refused:
        plan(mixture, 1, gpu_bytes)
    remedy = re.search(r"Give (\d+) GPUs", refused.value.message)
    assert remedy
    assert plan(mixture, int(remedy[1]), gpu_bytes, ()).placement.ranks > 1
    larger = re.search(r"or 1 of (\d+) GB", refused.value.message)
    assert larger
    assert plan(mixture, 1, int(larger[1]) * GB, ()).placement == Placement(1, 1)


def test_a_rank_too_large_for_any_run_is_refused_by_its_numbers(mixture: PlannedBase) -> None:
    gpu_bytes = enough_for(mixture, Placement(1, 1))
    with pytest.raises(InvalidRequest, match=r"rank 4096 on attn fits: it takes .* of each GPU"):
        plan(mixture, 1, gpu_bytes, (4096,))


def test_target_sets_that_do_not_fit_are_noted(mixture: PlannedBase) -> None:
    attention = LoraSpec(64, train_mlp=False, train_unembed=False)
    made = plan(mixture, 1, enough_for(mixture, Placement(1, 1), attention), (64,))
    assert [each.runs for each in made.adapters] == [1, 0, 0]
    assert ["rank 64 on attn, mlp fits" in note for note in made.notes] == [True]


def test_what_is_said_to_fit_fits_in_its_part(mixture: PlannedBase) -> None:
    made = plan(mixture, 2, 3 * enough_for(mixture, Placement(2, 1), ALL))
    part = made.memory.left // PARTS
    held = made.memory.weights_total + made.memory.reserved + PARTS * part
    assert 0 <= made.gpu_bytes - held < PARTS
    assert part - made.kv.bytes_per_token < made.kv.tokens * made.kv.bytes_per_token <= part
    for each in made.adapters:
        assert each.slots * each.slot_bytes <= part < (each.slots + 1) * each.slot_bytes
        assert each.runs * each.run_bytes < part


def test_a_base_too_large_for_its_heads_has_its_data_divided(dense: PlannedBase) -> None:
    kinds = [replace(k, count=100 * k.count) if k.is_gathered else k for k in dense.kinds]
    deep = replace(dense, kinds=kinds)
    made = plan(deep, 8, enough_for(deep, Placement(1, 8, data=8)), ())
    assert made.placement == Placement(1, 8, data=8)
    layer = 2 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48)
    assert made.memory.gathered == 2 * layer
    assert made.traffic.gathered_per_pass == 300 * layer * 7 // 8
    assert made.kv.bytes_per_token == deep.token_bytes(Placement(8, 1))
    assert any("for training" in note for note in made.notes)


def test_ranks_sum_once_after_each_divided_part(dense: PlannedBase, mixture: PlannedBase) -> None:
    size = 2 * 32  # hidden size in bfloat16
    by_tensor = Room(dense, Placement(1, 2, tensor=2), 10**9).traffic
    assert by_tensor.sums_per_token == 2 * 3  # attention and feed-forward
    assert by_tensor.sampled_token == 6 * size
    assert by_tensor.trained_token == 2 * by_tensor.sampled_token
    by_expert = Room(mixture, Placement(1, 2, expert=2), 10**9).traffic
    assert by_expert.sums_per_token == 2  # its second layer is dense
    both = Room(mixture, Placement(1, 2, 2, 2), 10**9).traffic
    assert both.sums_per_token == 2 * 3


def test_shared_halves_of_adapters_have_their_gradients_summed(dense: PlannedBase) -> None:
    attention = LoraSpec(RANK, train_mlp=False, train_unembed=False)
    found = Room(dense, Placement(1, 2, tensor=2), 10**9).adapters(attention)
    assert found.summed_bytes == 4 * RANK * 3 * (3 * 32 + 32)  # A of q, k and v, and B of o
    assert Room(dense, Placement(2, 1), 10**9).adapters(attention).summed_bytes == 0


def test_a_published_base_of_a_trillion_parameters_is_planned(tmp_path: Path) -> None:
    layers = []
    folder = config_of("Kimi-K2", tmp_path)
    base = planned_base(folder, "bfloat16", lambda done, of: layers.append((done, of)))
    assert layers == [(layer, 61) for layer in range(61)]
    assert base.num_params == 1_026_408_232_448
    assert (base.info.name, base.num_mixtures, base.widths.experts) == ("Kimi-K2", 60, 384)
    made = plan(base, 32, 141 * GB, (8,))
    assert made.placement == Placement(1, 32, tensor=32, expert=32)
    assert made.memory.weights["routed experts"] == 60 * 384 * 3 * 7168 * 2048 * 2 // 32
    assert made.kv.bytes_per_token == 61 * (512 + 64) * 2
    with pytest.raises(InvalidRequest, match=r"doesn't fit 8 GPUs .* Give 32 GPUs of 141 GB"):
        plan(base, 8, 141 * GB, (8,))
