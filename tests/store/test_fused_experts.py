"""Adapters of routed experts: one file of ours, both of PEFT's layouts, one meaning.

The reference is `transformers`' own Qwen3-MoE with `B @ A` added to each expert's weights, and
`peft` reading what we write.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from openmint.errors import InvalidRequest
from openmint.store.adapter_file import (
    check_adapter,
    encode_adapter,
    expected_tensors,
    from_float32,
)
from openmint.store.expert_files import Experts
from openmint.store.fused_experts import PARAMETERS
from openmint.store.peft_file import from_peft, to_peft
from openmint.types import BaseInfo, Digest, LoraSpec, TargetModule, stacks_of

CONFIG = transformers.Qwen3MoeConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=11,  # 10 comes after 9 here, and before 2 among names
    num_experts_per_tok=3,
    max_position_embeddings=64,
)
SPEC = LoraSpec(2, 6.0, train_unembed=False)
HEADS, HEADS_KV, HIDDEN, INNER = 32, 16, 32, 24
TOKENS = torch.arange(40).reshape(2, 20)


def qwen3_moe() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Qwen3MoeForCausalLM(CONFIG).eval()


def base_info() -> BaseInfo:
    targets = []
    for layer in range(CONFIG.num_hidden_layers):
        at = f"model.layers.{layer}"
        for name, num_in, num_out in (
            ("q_proj", HIDDEN, HEADS),
            ("k_proj", HIDDEN, HEADS_KV),
            ("v_proj", HIDDEN, HEADS_KV),
            ("o_proj", HEADS, HIDDEN),
        ):
            targets.append(TargetModule(f"{at}.self_attn.{name}", "attn", num_in, num_out))
        for expert in range(CONFIG.num_experts):
            for name, num_in, num_out in (
                ("gate_proj", HIDDEN, INNER),
                ("up_proj", HIDDEN, INNER),
                ("down_proj", INNER, HIDDEN),
            ):
                path = f"{at}.mlp.experts.{expert}.{name}"
                targets.append(TargetModule(path, "mlp", num_in, num_out))
    digest, stacks = Digest("sha256:" + "ab" * 32), stacks_of(targets)
    return BaseInfo(
        "tiny", digest, "qwen3_moe", "", "float32", "cpu", 96, 64, (2,), 1, 1, 8, stacks
    )


BASE = base_info()


def random_values() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(0)
    shapes = expected_tensors(BASE, SPEC)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def adapter_of(values: Mapping[str, Any]) -> bytes:
    tensors = {name: ("F32", v.shape, from_float32(v, "F32")) for name, v in values.items()}
    return encode_adapter(tensors, BASE.digest, SPEC)


def merged_logits(values: Mapping[str, Any], scaling: float = SPEC.scaling) -> torch.Tensor:
    """By the definition: each weight plus its own product, expert by expert."""
    model = qwen3_moe()

    def product(name: str, *place: int) -> torch.Tensor:
        a_RI, b_RO = (
            torch.from_numpy(values[f"{name}.{side}"][place]) for side in ("lora_A", "lora_B")
        )
        return scaling * b_RO.T @ a_RI

    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).weight += product(f"self_attn.{name}", index)
            experts = layer.mlp.experts
            for e in range(CONFIG.num_experts):
                experts.gate_up_proj[e, :INNER] += product("mlp.experts.gate_proj", index, e)
                experts.gate_up_proj[e, INNER:] += product("mlp.experts.up_proj", index, e)
                experts.down_proj[e] += product("mlp.experts.down_proj", index, e)
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def peft_logits(files: Mapping[str, bytes], folder: Path) -> torch.Tensor:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with torch.no_grad():
        logits: torch.Tensor = (
            peft.PeftModel.from_pretrained(qwen3_moe(), folder).eval()(TOKENS).logits
        )
    return logits


def test_experts_are_few_tensors_in_the_order_of_layers_and_experts() -> None:
    shapes = expected_tensors(BASE, SPEC)
    assert len(shapes) == 14
    assert shapes["mlp.experts.gate_proj.lora_A"] == (2, 11, 2, HIDDEN)
    assert shapes["mlp.experts.down_proj.lora_B"] == (2, 11, 2, HIDDEN)
    (stack,) = (stack for stack in BASE.stacks if stack.name == "mlp.experts.up_proj")
    assert [t.path for t in stack.targets][9:12] == [
        "model.layers.0.mlp.experts.9.up_proj",
        "model.layers.0.mlp.experts.10.up_proj",
        "model.layers.1.mlp.experts.0.up_proj",
    ]


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("experts", ["each", "fused"])
def test_what_we_export_means_the_same_to_peft(tmp_path: Path, experts: Experts) -> None:
    values = random_values()
    expected = merged_logits(values)
    with torch.no_grad():
        assert not torch.allclose(qwen3_moe()(TOKENS).logits, expected, atol=1e-2)
    files = to_peft(adapter_of(values), BASE, experts)
    torch.testing.assert_close(peft_logits(files, tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", ["each", "fused"])
def test_both_layouts_come_back_to_the_bit(experts: Experts) -> None:
    data = adapter_of(random_values())
    files = to_peft(data, BASE, experts)
    config = json.loads(files["adapter_config.json"])
    assert from_peft(files["adapter_model.safetensors"], config, BASE) == data


def peft_trained(folder: Path) -> tuple[bytes, dict[str, Any], torch.Tensor]:
    """A random adapter that `peft` made and saved, experts as parameters, and its logits."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=PARAMETERS,
    )
    model = peft.get_peft_model(qwen3_moe(), config).eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        logits = model(TOKENS).logits
    return weights, json.loads((folder / "adapter_config.json").read_text()), logits


def test_what_peft_trained_means_the_same_here(tmp_path: Path) -> None:
    weights, config, expected = peft_trained(tmp_path)
    data = from_peft(weights, config, BASE)
    assert check_adapter(data, BASE).spec == SPEC
    ours = {name: t.numpy() for name, t in safetensors.torch.load(data).items()}
    torch.testing.assert_close(merged_logits(ours), expected, atol=1e-5, rtol=1e-5)


def test_a_fused_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights, config, _ = peft_trained(tmp_path)
    for setting in (
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": None},
        {"target_parameters": [[]]},
        {"target_parameters": 3},
        {"target_parameters": [*PARAMETERS, "mlp.experts.other"]},
        {"rank_pattern": {"gate_up_proj": 4}},
        {"rank_pattern": {"gate_up_proj": 4}, "alpha_pattern": {"gate_up_proj": 6}},
        {"rank_pattern": {"q_proj": 4}},
        {"rank_pattern": 3},
        {"r": None},
        {"r": 3},
    ):
        with pytest.raises(InvalidRequest):
            from_peft(weights, config | setting, BASE)
    tensors = safetensors.torch.load(weights)
    name = next(name for name in tensors if name.endswith("experts.base_layer.lora_A.weight"))
    tensors[name] = tensors[name][:-2].contiguous()
    with pytest.raises(InvalidRequest, match="shape"):
        from_peft(safetensors.torch.save(tensors), config, BASE)


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
def test_gate_and_up_that_use_all_of_what_they_share_have_its_rank_the_others_zeros(
    tmp_path: Path,
) -> None:
    files = dict(to_peft(adapter_of(random_values()), BASE, "fused"))
    tensors = safetensors.torch.load(files["adapter_model.safetensors"])
    name = next(name for name in tensors if name.endswith("experts.base_layer.lora_B.weight"))
    tensors[name] += 0.1
    files["adapter_model.safetensors"] = safetensors.torch.save(tensors)
    config = json.loads(files["adapter_config.json"])
    data = from_peft(files["adapter_model.safetensors"], config, BASE)
    assert check_adapter(data, BASE).spec == LoraSpec(4, 12.0, train_unembed=False)
    ours = {name: t.numpy() for name, t in safetensors.torch.load(data).items()}
    assert not ours["mlp.experts.down_proj.lora_B"][:, :, 2:].any()
    expected = peft_logits(files, tmp_path / "in")
    torch.testing.assert_close(merged_logits(ours), expected, atol=1e-5, rtol=1e-5)
    narrow = dataclasses.replace(BASE, max_rank=3)
    with pytest.raises(InvalidRequest, match=r"adapter rank 4 is outside 1\.\.3"):
        from_peft(files["adapter_model.safetensors"], config, narrow)


def test_parameters_of_experts_are_refused_where_the_file_has_them_one_by_one() -> None:
    files = to_peft(adapter_of(random_values()), BASE, "each")
    config = {**json.loads(files["adapter_config.json"]), "target_parameters": PARAMETERS}
    with pytest.raises(InvalidRequest, match="target_parameters"):
        from_peft(files["adapter_model.safetensors"], config, BASE)
