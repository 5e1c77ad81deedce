"""Adapter files: stable bytes, admission, PEFT in and out with the real `peft`, mutants."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from openmint.errors import InvalidRequest, OpenMintError, UnsupportedFormat
from openmint.store.adapter_file import (
    PREFIX,
    check_adapter,
    encode_adapter,
    expected_tensors,
    from_float32,
    from_peft,
    to_float32,
    to_peft,
)
from openmint.store.safetensors_header import TensorBytes, read_header
from openmint.types import BaseInfo, Digest, LoraSpec, TargetGroup, TargetModule

CONFIG = transformers.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUP_OF: dict[str, TargetGroup] = {
    "q_proj": "attn",
    "k_proj": "attn",
    "v_proj": "attn",
    "o_proj": "attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
    "lm_head": "unembed",
}
LAYERS = [module for module in GROUP_OF if module != "lm_head"]
SPEC = LoraSpec(4, 8.0)


def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(CONFIG).eval()


def base_info(dtype: str = "float32") -> BaseInfo:
    targets = tuple(
        TargetModule(path, GROUP_OF[leaf], module.in_features, module.out_features)
        for path, module in llama().named_modules()
        if (leaf := path.rpartition(".")[2]) in GROUP_OF
    )
    digest = Digest("sha256:" + "ab" * 32)
    return BaseInfo("tiny/llama", digest, "llama", "", dtype, "cpu", 96, 64, (2,), 1, 1, 8, targets)


BASE = base_info()


def random_tensors(spec: LoraSpec = SPEC, dtype: str = "F32") -> dict[str, TensorBytes]:
    rng = np.random.default_rng(0)
    return {
        name: (dtype, shape, from_float32(rng.normal(size=shape).astype(np.float32), dtype))
        for name, shape in expected_tensors(BASE, spec).items()
    }


def adapter(spec: LoraSpec = SPEC) -> bytes:
    return encode_adapter(random_tensors(spec), BASE.digest, spec)


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


def test_equal_weights_give_equal_bytes_in_any_order() -> None:
    tensors = random_tensors()
    backwards = dict(reversed(tensors.items()))
    assert encode_adapter(backwards, BASE.digest, SPEC) == adapter()
    loaded = safetensors.torch.load(adapter())
    for name, (_, shape, raw) in tensors.items():
        assert loaded[name].shape == shape
        assert loaded[name].numpy().tobytes() == raw


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(1, 32.0),
        LoraSpec(8, 0.5, train_mlp=False, train_unembed=False),
        LoraSpec(2, 16.0, train_attn=False),
    ],
)
def test_an_adapter_of_its_base_is_admitted(spec: LoraSpec) -> None:
    header = check_adapter(adapter(spec), BASE)
    assert header.spec == spec
    assert {n: e.shape for n, e in header.tensors.items()} == expected_tensors(BASE, spec)


def test_admission_lists_what_differs_and_at_most_ten() -> None:
    tensors = random_tensors()
    first, second, third, fourth, *_ = tensors
    del tensors[first]
    tensors[second] = ("F32", (1, 1), bytes(4))
    dtype, shape, raw = tensors[third]
    tensors[third] = ("BF16", shape, raw[: len(raw) // 2])
    tensors[fourth] = (dtype, tensors[fourth][1], b"\0\0\x80\x7f" + tensors[fourth][2][4:])
    tensors["another"] = ("F32", (1,), bytes(4))
    with pytest.raises(InvalidRequest) as refusal:
        check_adapter(encode_adapter(tensors, BASE.digest, SPEC), BASE)
    for part in (f"{first}: missing", f"{second}: shape", f"{third}: dtype", "another: not a"):
        assert part in refusal.value.message
    assert f"{fourth}: NaN or infinite" in refusal.value.message
    with pytest.raises(InvalidRequest, match="and 7 more") as refusal:
        check_adapter(encode_adapter({"a": ("F32", (1,), bytes(4))}, BASE.digest, SPEC), BASE)
    assert refusal.value.message.count("missing") == 10


@pytest.mark.parametrize("bits", [b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\xff\xff"])
def test_bfloat16_infinities_and_nans_are_refused(bits: bytes) -> None:
    base = dataclasses.replace(BASE, dtype="bfloat16")
    tensors = random_tensors(dtype="BF16")
    assert check_adapter(encode_adapter(tensors, base.digest, SPEC), base).spec == SPEC
    name, (dtype, shape, raw) = next(iter(tensors.items()))
    tensors[name] = (dtype, shape, raw[:-2] + bits)
    with pytest.raises(InvalidRequest, match="NaN or infinite"):
        check_adapter(encode_adapter(tensors, base.digest, SPEC), base)


def test_another_base_rank_or_format_is_refused() -> None:
    other = dataclasses.replace(BASE, digest=Digest("sha256:" + "cd" * 32))
    with pytest.raises(InvalidRequest, match="belongs to base"):
        check_adapter(adapter(), other)
    with pytest.raises(InvalidRequest, match=r"rank 4 is outside 1\.\.2"):
        check_adapter(adapter(), dataclasses.replace(BASE, max_rank=2))
    with pytest.raises(InvalidRequest, match="not an adapter file"):
        check_adapter(safetensors.torch.save({"a": torch.ones(1)}), BASE)
    with pytest.raises(UnsupportedFormat):
        check_adapter(b"\x80\x04}\x94.", BASE)


@pytest.mark.parametrize("text", ["\ud800", "x" * 10_000])
@pytest.mark.parametrize("key", ["format", "base", "targets", "rank", "alpha"])
def test_foreign_metadata_in_a_message_stays_short_and_writable(key: str, text: str) -> None:
    data = adapter()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"][key] = text
    changed = json.dumps(header).encode()
    with pytest.raises(InvalidRequest) as refusal:
        check_adapter(len(changed).to_bytes(8, "little") + changed + data[end:], BASE)
    assert len(refusal.value.message.encode()) < 500


def test_bfloat16_rounds_to_nearest_even_like_torch() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    ours = to_float32(from_float32(values, "BF16"), "BF16")
    theirs = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(ours, theirs)


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


def mutant(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes of its header, mostly, changed, cut, repeated or moved."""
    changed = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(header if rng.random() < 0.9 else len(changed))
        match rng.randrange(5):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + rng.randint(1, 9)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 9)]
            case 4:
                changed[at : at + 1] = rng.choice([b"[", b'"', b"-", b"1e9", b"9" * 20, b"null"])
        header = min(header, len(changed))
    return bytes(changed)


def test_mutants_are_admitted_or_refused_and_never_more() -> None:
    spec = LoraSpec(1, 8.0, train_mlp=False, train_unembed=False)
    data, rng, num_refused = adapter(spec), random.Random(5), 0
    for _ in range(15_000):
        try:
            header = check_adapter(changed := mutant(data, rng), BASE)
        except OpenMintError as refusal:
            num_refused += 1
            refusal.message.encode()
        else:
            expected = expected_tensors(BASE, header.spec)
            assert {n: e.shape for n, e in read_header(changed).tensors.items()} == expected
    assert num_refused > 10_000


def test_mutants_of_a_peft_file_are_admitted_or_refused(tmp_path: Path) -> None:
    weights, config, _ = peft_files(tmp_path, r=1, target_modules=["lm_head"])
    rng = random.Random(6)
    for _ in range(5_000):
        try:
            check_adapter(from_peft(mutant(weights, rng), config, BASE), BASE)
        except OpenMintError as refusal:
            refusal.message.encode()
