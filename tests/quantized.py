"""Tiny checkpoints as they are published quantized, and what `transformers` makes of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from openmint.models.weights import INDEX, SINGLE
from tests.workbench import ALL_FAMILIES, random_model

FP8 = ("qwen3", "qwen3-moe", "minimax-m2", "deepseek-v3", "deepseek-v3.2", "glm-5")
MXFP4 = ("gpt-oss",)
BLOCK = (20, 12)
"""Neither divides any width of a tiny model."""
IN_FP8 = re.compile(r"model\.layers\..*(_proj|\.w[123k]|\.wq_b)(_with_mqa)?\.weight")
LEFT_OUT = re.compile(r".*weights_proj\.weight")


def published(
    family: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    block: tuple[int, int] = BLOCK,
    scales: torch.dtype = torch.float32,
    is_sharded: bool = True,
) -> tuple[Path, Path]:
    """A random model's folder in the form in which the family is published, and one of the same
    values in float32."""
    if family in MXFP4:
        name, extra = ALL_FAMILIES[family]
        sizes = {"hidden_size": 64, "intermediate_size": 96}
        monkeypatch.setitem(ALL_FAMILIES, family, (name, {**extra, **sizes}))
    plain = random_model(family, root / "plain")
    folder = root / "published"
    shutil.copytree(plain, folder)
    tensors = load_file(plain / SINGLE)
    torch.manual_seed(2)
    method = "mxfp4" if family in MXFP4 else "fp8"
    settings: dict[str, Any] = {"quant_method": method, "modules_to_not_convert": ["lm_head"]}
    if family in MXFP4:
        codes, values = _in_mxfp4(tensors)
    else:
        settings |= {"weight_block_size": list(block), "fmt": "e4m3"}
        codes, values = _in_fp8(tensors, block, scales)
    save_file({**tensors, **values}, plain / SINGLE, {"format": "pt"})
    others = {name: tensor for name, tensor in tensors.items() if name not in values}
    write(folder, {**others, **codes}, is_sharded=is_sharded)
    configure(folder, settings)
    return folder, plain


def write(folder: Path, tensors: dict[str, Tensor], *, is_sharded: bool) -> None:
    """The checkpoint's file, or two of them: neighbours are in different ones."""
    (folder / SINGLE).unlink(missing_ok=True)
    if not is_sharded:
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        own = names[number::2]
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def configure(folder: Path, settings: dict[str, Any] | None) -> None:
    """Have config.json say how the checkpoint is quantized; None: that it isn't."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def _in_mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stored and dequantized stacks of experts; of every code and a few scales."""
    codes, values = {}, {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, num_in, num_out = tensors[name].shape
        shape = num_experts, num_out, num_in // 32
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8)
        codes[f"{name}_blocks"], codes[f"{name}_scales"] = blocks, scales
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return codes, values


def _in_fp8(
    tensors: dict[str, Tensor], block: tuple[int, int], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    codes, values = {}, {}
    for name, weight in tensors.items():
        if not IN_FP8.fullmatch(name) or LEFT_OUT.fullmatch(name):
            continue
        height, width = block
        num_out, num_in = weight.shape
        # `transformers` takes the block's size from the shapes, so it gets whole blocks.
        whole = F.pad(weight, (0, -num_in % width, 0, -num_out % height))
        tiles = whole.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        scales = (tiles.abs().amax(dim=(1, 3)) / 400).to(dtype)
        spread = scales.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
        stored = (whole / spread).to(torch.float8_e4m3fn)
        made = Fp8Dequantize(None)._dequantize_one(stored, scales, torch.float32)
        values[name] = made[:num_out, :num_in].contiguous()
        codes[name] = stored[:num_out, :num_in].contiguous()
        codes[f"{name}_scale_inv"] = scales
    return codes, values
