"""Quantized checkpoints are read as `transformers` dequantizes them, and no more of them than is
asked for."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from openmint.config import WorkerConfig
from openmint.errors import InvalidRequest
from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.layers.gathered import GatheredLinear
from openmint.models.loader import load_model, read_config
from openmint.models.model import Model
from openmint.models.quantized import BAND, dequantized
from openmint.models.weights import INDEX, SINGLE, Tensors, Weights
from openmint.plan.placement import Placement
from openmint.types import Digest
from tests.held import division_of
from tests.quantized import FP8, MXFP4, configure, published, write
from tests.workbench import Workbench, prompt_of, random_model, reference

CPU = torch.device("cpu")
PLACEMENTS = (
    Placement(1, 2, tensor=2),
    Placement(1, 2, expert=2),
    Placement(1, 2, tensor=2, expert=2),
    Placement(1, 2, data=2),
)


def tensors_of(folder: Path, dtype: torch.dtype = torch.float32) -> Tensors:
    return dequantized(Weights(folder, dtype, CPU), read_config(folder))


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss"])
def test_every_tensor_is_what_transformers_makes_of_it(
    family: str,
    dtype: torch.dtype,
    is_sharded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, plain = published(family, tmp_path, monkeypatch, is_sharded=is_sharded)
    tensors, values = tensors_of(folder, dtype), load_file(plain / SINGLE)
    for name, value in values.items():
        assert torch.equal(tensors[name], value.to(dtype)), name
        assert tensors.shape(name) == value.shape
        assert torch.equal(tensors.exact(name), value)
    assert tensors.get("model.layers.0.self_attn.q_proj.nothing") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_and_scale_of_mxfp4_is_what_transformers_makes_of_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Scales from the least to the greatest that leaves 6 finite, in more rows than are dequantized
    at once."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3 * 253, 16, 16)
    scales = torch.arange(253, dtype=torch.uint8).repeat(3).view(1, -1, 1).expand(1, -1, 16)
    assert blocks.shape[1] > BAND
    stored = {"w_blocks": blocks.contiguous(), "w_scales": scales.contiguous()}
    theirs = convert_moe_packed_tensors(**{k[2:]: v for k, v in stored.items()}, dtype=dtype)
    save_file(stored, tmp_path / SINGLE)
    ours = tensors_with(tmp_path, {"quant_method": "mxfp4"}, dtype)["w"]
    assert theirs.isfinite().all()
    assert torch.equal(ours, theirs)
    assert torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32, torch.float8_e8m0fnu])
def test_every_byte_of_fp8_is_what_transformers_makes_of_it(
    scale_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]  # 254
    weight = codes.expand(256, 254).contiguous()
    scales = (torch.rand(2, 2) + 0.1).to(scale_dtype)
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / SINGLE)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 127]}
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)
    assert torch.equal(tensors_with(tmp_path, settings, dtype)["w"], theirs)


def tensors_with(folder: Path, settings: dict[str, object], dtype: torch.dtype) -> Tensors:
    """Of a folder that holds no model."""
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors_of(folder, dtype)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Numbers read of each tensor."""
    found: dict[str, int] = {}
    mapped = Weights._mapped

    def noting(self: Weights, name: str, cut: tuple[slice, ...]) -> Tensor:
        tensor = mapped(self, name, cut)
        found[name] = found.get(name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(Weights, "_mapped", noting)
    return found


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((0, 48), (0, 32)),
        ((20, 40), (12, 24)),
        ((5, 6), (3, 30)),
        ((19, 41), (11, 13)),
        ((40, 40), (0, 32)),
    ],
    ids=str,
)
def test_a_part_of_fp8_is_read_with_its_own_blocks_scales(
    rows: tuple[int, int],
    columns: tuple[int, int],
    reads: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, plain = published("qwen3", tmp_path, monkeypatch)
    name = "model.layers.1.mlp.up_proj.weight"
    cut = slice(*rows), slice(*columns)
    part = tensors_of(folder).part(name, cut)
    assert torch.equal(part, load_file(plain / SINGLE)[name][cut])
    sides = (20, rows), (12, columns)
    touched = [len({i // side for i in range(*span)}) for side, span in sides]
    assert reads == {name: part.numel(), f"{name}_scale_inv": touched[0] * touched[1]}


@pytest.mark.parametrize(
    ("experts", "columns", "rows"),
    [
        ((0, 8), (0, 64), (0, 192)),
        ((2, 5), (32, 64), (10, 30)),
        ((7, 8), (3, 30), (191, 192)),
        ((1, 3), (31, 33), (0, 2)),
        ((4, 4), (0, 64), (0, 192)),
        ((4, 6), (0, 64), (5, 5)),
    ],
    ids=str,
)
def test_a_part_of_mxfp4_is_read_with_its_own_groups_scales(
    experts: tuple[int, int],
    columns: tuple[int, int],
    rows: tuple[int, int],
    reads: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, plain = published("gpt-oss", tmp_path, monkeypatch)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    cut = slice(*experts), slice(*columns), slice(*rows)
    part = tensors_of(folder).part(name, cut)
    assert torch.equal(part, load_file(plain / SINGLE)[name][cut])
    groups = len({i // 32 for i in range(*columns)})
    num_scales = (experts[1] - experts[0]) * (rows[1] - rows[0]) * groups
    assert reads.get(f"{name}_scales", 0) == num_scales
    assert reads.get(f"{name}_blocks", 0) == 16 * num_scales


@pytest.mark.parametrize("family", [*FP8, *MXFP4])
def test_a_published_folder_has_the_logits_of_the_dequantized_one_in_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = published(family, tmp_path, monkeypatch)
    bench, tokens = Workbench(folder, tmp_path / "store"), torch.from_numpy(prompt_of(21))
    attention = PackedAttention((21,), CPU)
    with torch.no_grad():
        hidden = bench.model.forward(tokens, torch.arange(21), Batch(attention, None))
        ours = bench.model.head(hidden, None)
        theirs = reference(plain)(tokens[None]).logits[0]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_kimi_k2_is_dequantized_though_its_config_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = published("deepseek-v3", tmp_path, monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    settings = WorkerConfig(dtype="float32")
    folders = folder, plain
    found, expected = (held(load_model("k", each, Digest(""), settings)[0]) for each in folders)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("placement", PLACEMENTS, ids=["tensor", "experts", "both", "data"])
@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_a_rank_holds_its_part_of_the_dequantized_weights(
    family: str,
    placement: Placement,
    reads: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, plain = published(family, tmp_path, monkeypatch)
    config, division = WorkerConfig(dtype="float32"), division_of(placement, 1)
    expected = held(load_model("plain", plain, Digest(""), config, division)[0])
    reads.clear()
    found = held(load_model("published", folder, Digest(""), config, division)[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if placement.data > 1 and family == "gpt-oss":
        return  # it takes its stacks whole, and keeps rows
    weights = Weights(folder, torch.float32, CPU)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    codes = [n for n in names if ".experts." in n and n.endswith((".weight", "_blocks"))]
    whole = sum(prod(weights.shape(name)) for name in codes)
    # Half, and of a group of 32 that is cut in two all.
    assert whole / 2 <= sum(reads.get(name, 0) for name in codes) < 0.6 * whole


def held(model: Model) -> list[Tensor]:
    """Weights of linear layers that a rank has."""
    return [
        linear.own_RI if isinstance(linear, GatheredLinear) else linear.weight_OI
        for linear in model.linears
    ]


def reread(folder: Path, name: str, change: dict[str, Tensor | None]) -> Tensor:
    """A tensor of the folder once others of it are changed; None: taken away."""
    tensors = {**load_file(folder / SINGLE), **change}
    write(folder, {n: t for n, t in tensors.items() if t is not None}, is_sharded=False)
    return tensors_of(folder)[name]


FP8_NAME, MXFP4_NAME = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        (None, "lacks tensor 'model.layers.0.mlp.up_proj.weight_scale_inv'"),
        (torch.ones(3, 4), r"\[3, 4\].*blocks of \[20, 12\].*\[3, 3\]"),
        (torch.full((3, 3), torch.nan), "infinite or no numbers"),
        (torch.full((3, 3), torch.inf), "infinite or no numbers"),
        (torch.full((3, 3), 1e37), "infinite or no numbers"),
        (torch.full((3, 3), 127, dtype=torch.uint8), "holds F8_E4M3, they U8; supported"),
    ],
    ids=["missing", "another block", "nan", "infinite", "too large", "bytes"],
)
def test_fp8_whose_scales_do_not_fit_is_refused(
    scales: Tensor | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = published("qwen3", tmp_path, monkeypatch, is_sharded=False)
    with pytest.raises(InvalidRequest, match=reason):
        reread(folder, FP8_NAME, {f"{FP8_NAME}_scale_inv": scales})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, torch.bfloat16])
def test_codes_of_another_kind_are_refused(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = published("qwen3", tmp_path, monkeypatch, is_sharded=False)
    weight = load_file(plain / SINGLE)[FP8_NAME].to(dtype)
    with pytest.raises(InvalidRequest, match=r"has scales and holds .*in bfloat16"):
        reread(folder, FP8_NAME, {FP8_NAME: weight})
    if dtype != torch.bfloat16:
        with pytest.raises(InvalidRequest, match=r"config\.json doesn't say how"):
            reread(folder, FP8_NAME, {f"{FP8_NAME}_scale_inv": None})


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        (None, f"lacks tensor '{MXFP4_NAME}_scales'"),
        (torch.full((8, 64, 2), 120, dtype=torch.uint8), "fetch the checkpoint anew"),
        (torch.full((8, 64, 3), 253, dtype=torch.uint8), "infinite or no numbers"),
        (torch.full((8, 64, 3), 255, dtype=torch.uint8), "infinite or no numbers"),
    ],
    ids=["missing", "another shape", "infinite", "nan"],
)
def test_mxfp4_whose_scales_do_not_fit_is_refused(
    scales: Tensor | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = published("gpt-oss", tmp_path, monkeypatch, is_sharded=False)
    with pytest.raises(InvalidRequest, match=reason):
        reread(folder, MXFP4_NAME, {f"{MXFP4_NAME}_scales": scales})


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_other_quantizations_are_refused_by_name_with_the_remedy(
    method: str, tmp_path: Path
) -> None:
    folder = random_model("qwen3", tmp_path)
    configure(folder, {"quant_method": method})
    with pytest.raises(
        InvalidRequest, match=f"by '{method}', .*in bfloat16, or one quantized by fp8 or mxfp4"
    ):
        load_model("tiny", folder, Digest(""), WorkerConfig())


@pytest.mark.parametrize("block", [None, [128], [0, 128], 128])
def test_fp8_without_a_size_of_blocks_is_refused(block: object, tmp_path: Path) -> None:
    folder = random_model("qwen3", tmp_path)
    configure(folder, {"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(InvalidRequest, match=r"weight_block_size .*supported: two numbers"):
        load_model("tiny", folder, Digest(""), WorkerConfig())


def test_fp8_of_which_the_config_says_nothing_is_not_read_without_its_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = published("qwen3", tmp_path, monkeypatch)
    configure(folder, None)
    with pytest.raises(InvalidRequest, match=r"F8_E4M3.*config\.json doesn't say"):
        load_model("tiny", folder, Digest(""), WorkerConfig())
