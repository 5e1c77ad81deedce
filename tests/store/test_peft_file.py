"""PEFT's files in and out, judged by the real `peft` on `transformers` models."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from openmint.errors import InvalidRequest, OpenMintError
from openmint.store.adapter_file import check_adapter
from openmint.store.peft_file import PREFIX, from_peft, to_peft
from openmint.types import LoraSpec
from tests.store.tiny_base import BASE, LAYERS, llama, mutant


def peft_files(directory: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random adapter as `peft` writes it, and the model that holds it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(llama(), config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = (0.1 * torch.randn_like(parameter)).to(dtype)
    model.save_pretrained(directory, save_embedding_layers=False)
    weights = (directory / "adapter_model.safetensors").read_bytes()
    return weights, json.loads((directory / "adapter_config.json").read_text()), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_peft_folder_is_imported_and_exported_with_the_same_outputs(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    weights, config, model = peft_files(tmp_path / "in", dtype)
    data = from_peft(weights, config, BASE)
    assert check_adapter(data, BASE).spec == LoraSpec(4, 8.0, train_unembed=False)
    (tmp_path / "out").mkdir()
    for name, content in to_peft(data, BASE).items():
        (tmp_path / "out" / name).write_bytes(content)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        # peft itself computes in fp32 where the base does.
        theirs, ours = model.float().eval()(tokens).logits, loaded(tokens).logits
        assert not torch.allclose(llama()(tokens).logits, theirs, atol=1e-3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|k|v|o|gate|up|down)_proj", LAYERS])
def test_the_targets_may_be_a_list_a_pattern_or_all_linear(tmp_path: Path, targets: Any) -> None:
    weights, config, _ = peft_files(tmp_path, target_modules=targets)
    spec = check_adapter(from_peft(weights, config, BASE), BASE).spec
    assert spec.groups == ("attn", "mlp")


def test_an_adapter_of_the_output_layer_goes_both_ways(tmp_path: Path) -> None:
    weights, config, _ = peft_files(tmp_path, target_modules=["lm_head"])
    data = from_peft(weights, config, BASE)
    assert check_adapter(data, BASE).spec.groups == ("unembed",)
    assert json.loads(to_peft(data, BASE)["adapter_config.json"])["target_modules"] == ["lm_head"]


def test_import_rounds_to_the_dtype_of_the_base(tmp_path: Path) -> None:
    weights, config, _ = peft_files(tmp_path)
    data = from_peft(weights, config, dataclasses.replace(BASE, dtype="bfloat16"))
    exported = to_peft(data, dataclasses.replace(BASE, dtype="bfloat16"))
    theirs = safetensors.torch.load(weights)
    ours = safetensors.torch.load(exported["adapter_model.safetensors"])
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)


def test_half_a_target_group_is_refused_with_the_missing_modules(tmp_path: Path) -> None:
    weights, config, _ = peft_files(tmp_path, target_modules=["q_proj", "v_proj"])
    with pytest.raises(InvalidRequest) as refusal:
        from_peft(weights, config, BASE)
    assert f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight: missing" in str(refusal.value)
    assert "o_proj" in refusal.value.message


@pytest.mark.parametrize(
    "setting",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"layers_to_transform": [0]},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa_niter_4"},
        {"peft_type": "LOHA"},
        {"r": True},
        {"r": 9},
        {"r": 0},
        {"r": "4"},
        {"r": 10**30},
        {"lora_alpha": float("nan")},
        {"lora_alpha": -1},
        {"lora_alpha": None},
        {"use_dora": "\ud800" * 5000},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_change_the_computation_are_refused(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    weights, config, _ = peft_files(tmp_path)
    with pytest.raises(InvalidRequest) as refusal:
        from_peft(weights, {**config, **setting}, BASE)
    assert len(refusal.value.message.encode()) < 500


def test_mutants_of_a_peft_file_are_admitted_or_refused(tmp_path: Path) -> None:
    weights, config, _ = peft_files(tmp_path, r=1, target_modules=["lm_head"])
    rng = random.Random(6)
    for _ in range(5_000):
        try:
            check_adapter(from_peft(mutant(weights, rng), config, BASE), BASE)
        except OpenMintError as refusal:
            refusal.message.encode()
