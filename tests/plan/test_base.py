"""A base that is built without memory is, to the byte, what a worker holds of the real one."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from openmint.engine.route_record import RouteCache
from openmint.errors import InvalidRequest
from openmint.layers import linear
from openmint.models.loader import architecture_of, read_config
from openmint.models.meta import meta_model
from openmint.plan.base import PlannedBase, planned_base
from openmint.plan.placement import Placement, Widths, cuts_of, placements
from openmint.plan.plan import Room
from openmint.types import LoraSpec
from tests.held import division_of, measured
from tests.quantized import configure, published
from tests.workbench import ALL_FAMILIES, random_model

ONE = Placement(1, 1)
WORKERS = [
    ("float32", LoraSpec(8)),
    ("bfloat16", LoraSpec(4, train_mlp=False, train_unembed=False)),
]
MID_SIZE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}
"""28 million parameters."""


@pytest.fixture(params=ALL_FAMILIES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def mid_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen3MoeConfig(**MID_SIZE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("mid-size")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: where a CPU has tiles, a base lies in memory once for each direction."""
    monkeypatch.setattr(linear, "IS_AVAILABLE", False)


def planned(path: Path, dtype: str = "float32") -> PlannedBase:
    return planned_base(path, dtype, lambda done, of: None)


def checkpoint_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_a_family_takes_every_tensor_of_its_checkpoint_in_its_shape(folder: Path) -> None:
    config = read_config(folder)
    _, reads = meta_model(architecture_of(config), config, torch.float32)
    assert {read.name: read.shape for read in reads} == checkpoint_of(folder)


def test_nothing_of_a_planned_base_has_memory(folder: Path) -> None:
    config = read_config(folder)
    model, _ = meta_model(architecture_of(config), config, torch.float32)
    assert model.embedding_VD.is_meta
    assert {each.device.type for each in model.linears} == {"meta"}


def assert_as_planned(folder: Path, dtype: str, spec: LoraSpec) -> None:
    base = planned(folder, dtype)
    room = Room(base, ONE, 10**9)
    cache_bytes = 1024 * room.kv.bytes_per_token
    held = measured(folder, dtype, spec, cache_bytes)
    adapter = room.adapters(spec)
    expected = (room.memory.weights_total, cache_bytes, adapter.run_bytes, adapter.slot_bytes)
    for name, found, bytes_planned in zip(
        asdict(held), asdict(held).values(), expected, strict=True
    ):
        assert abs(found / bytes_planned - 1) < 0.001, name


@pytest.mark.usefixtures("without_tiles")
@pytest.mark.parametrize(("dtype", "spec"), WORKERS)
def test_a_worker_holds_what_was_planned(folder: Path, dtype: str, spec: LoraSpec) -> None:
    assert_as_planned(folder, dtype, spec)


@pytest.mark.usefixtures("without_tiles")
def test_a_worker_of_a_mid_size_mixture_holds_what_was_planned(mid_size: Path) -> None:
    assert planned(mid_size).num_params > 25e6
    assert_as_planned(mid_size, "bfloat16", LoraSpec(16))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_family_takes_on_each_rank_what_is_planned(folder: Path, rank: int) -> None:
    base, config = planned(folder), read_config(folder)
    for placement in placements(2, base.widths):
        if placement.data > 1 and architecture_of(config) == "GptOssForCausalLM":
            continue  # it takes its stacks whole, and keeps rows
        division = division_of(placement, rank)
        model, reads = meta_model(architecture_of(config), config, torch.float32, division=division)
        taken = 4 * sum(prod(read.shape) for read in reads)
        held = sum(base.share_bytes(placement).values()) - base.table_bytes
        assert abs(taken / held - 1) < 0.01  # biases are taken whole, and cut then
        assert 4 * model.cache_shape.num_values == base.token_bytes(placement)
        for spec in (LoraSpec(8), LoraSpec(8, train_mlp=False)):
            pieces = [piece for linear in (*model.linears, model.head) for piece in linear.pieces]
            own = [piece.own for piece in pieces if piece.own.group in spec.groups]
            values = sum(spec.rank * (target.num_in + target.num_out) for target in own)
            assert values == base.adapter_values(spec, placement)[0]


def test_a_family_refuses_divisions_that_are_not_planned(folder: Path) -> None:
    base, config = planned(folder), read_config(folder)
    ways = {(each.tensor, each.expert) for each in placements(2, base.widths)}
    for tensor, expert in [(2, 1), (1, 2), (2, 2)]:
        if (tensor, expert) in ways or (expert > 1 and not base.widths.experts):
            continue
        division = division_of(Placement(1, 2, tensor, expert), 0)
        with pytest.raises(InvalidRequest):
            meta_model(architecture_of(config), config, torch.float32, division=division)


def test_latents_are_on_every_rank_and_heads_on_one(tmp_path: Path) -> None:
    divided = Placement(1, 2, tensor=2)
    latent = planned(random_model("deepseek-v3.2", tmp_path / "latent"))
    assert latent.token_bytes(divided) == latent.token_bytes(ONE)
    grouped = planned(random_model("qwen3", tmp_path / "grouped"))
    assert 2 * grouped.token_bytes(divided) == grouped.token_bytes(ONE)


def test_a_token_that_chooses_leaves_a_record(folder: Path) -> None:
    base = planned(folder)
    shape = base.routes
    held = RouteCache(shape, 10).__dict__.values() if shape else ()
    arrays = [each for each in held if isinstance(each, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 10 * base.record_bytes


def test_ranks_divide_only_what_they_divide_evenly() -> None:
    widths = Widths(frozenset({4, 512}), frozenset({96}), frozenset({64}), experts=6)
    found = [each for each in placements(12, widths) if each.data == 1]
    ways = {(each.ranks, each.tensor, each.expert) for each in found}
    assert ways == {(1, 1, 1), (2, 2, 2), (2, 1, 2), (2, 2, 1), (4, 4, 1)}


def test_an_unsupported_architecture_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    config = transformers.Qwen3NextConfig(
        num_hidden_layers=4, architectures=["Qwen3NextForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match=r"Qwen3NextForCausalLM.*linear_attn.conv1d.weight"):
        planned(tmp_path)
    config = transformers.OlmoConfig(num_hidden_layers=2, architectures=["OlmoForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match=r"OlmoForCausalLM.*missing: a family"):
        planned(tmp_path)
    config = transformers.T5Config(architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match=r"T5ForConditionalGeneration.*reads text alone"):
        planned(tmp_path)


def test_a_config_file_alone_will_do_and_a_bad_one_is_named(folder: Path, tmp_path: Path) -> None:
    assert planned(folder / "config.json").kinds == planned(folder).kinds
    with pytest.raises(InvalidRequest, match="there is no"):
        planned(tmp_path)
    for text in (
        "{",
        "[]",
        "{}",
        '{"model_type": "unheard"}',
        '{"model_type": "llama", "vocab_size": "x"}',
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InvalidRequest, match="no config that transformers knows"):
            planned(tmp_path)


def test_kimi_k2_is_read_as_what_it_is(tmp_path: Path) -> None:
    folder = random_model("deepseek-v3", tmp_path)
    before = planned(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert planned(folder).kinds == before.kinds


@pytest.mark.usefixtures("without_tiles")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss"])
def test_a_quantized_base_takes_what_its_values_take(
    family: str,
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, plain = published(family, tmp_path, monkeypatch)
    base, method = planned(folder, dtype), "mxfp4" if family == "gpt-oss" else "fp8"
    assert base.kinds == planned(plain, dtype).kinds
    assert f"quantized by {method}; they are held in {dtype}" in base.notes[0]
    held = measured(folder, dtype, LoraSpec(4), kv_cache_bytes=2**20)
    assert abs(sum(base.share_bytes(ONE).values()) / held.weights - 1) < 0.01


def test_a_quantization_that_is_not_read_is_noted(tmp_path: Path) -> None:
    folder = random_model("qwen3-moe", tmp_path)
    configure(folder, {"quant_method": "awq"})
    assert "quantized by 'awq', which is not read" in planned(folder).notes[0]


def test_no_tensor_name_is_guessed_at() -> None:
    assert cuts_of("model.layers.0.linear_attn.in_proj_qkvz.weight") is None
    with pytest.raises(InvalidRequest, match="in_proj_ba"):
        ONE.sizes("linear_attn.in_proj_ba.weight", (4, 4), False)
    assert prod(ONE.sizes("self_attn.q_proj.weight", (4, 4), False)) == 16
