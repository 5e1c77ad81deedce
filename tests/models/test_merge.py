"""A merged folder computes what PEFT computes after its own merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from openmint.errors import InvalidRequest
from openmint.models.merge import PREFIX, merge_into_folder

TARGETS = ["q_proj", "o_proj", "down_proj", "lm_head"]


def random_adapter(base: Path, directory: Path) -> peft.PeftModel:
    """A PEFT model over `base` with random A and B, saved to `directory`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return adapted


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_merged_folder_has_the_logits_of_pefts_merge(
    family: str, tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_base(family)
    adapted = random_adapter(base, tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapter = {name: tensor for name, tensor in adapter.items() if ".lora_" in name}
    merge_into_folder(base, adapter, 2.0, tmp_path / "merged")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    unmerged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = adapted.merge_and_unload().to(torch.bfloat16).float()
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        ours_logits, their_logits = merged(tokens).logits, theirs(tokens).logits
        changed = (unmerged(tokens).logits - their_logits).abs().max()
    # The two sums may round to neighbouring bf16 numbers where they fall between them.
    torch.testing.assert_close(ours_logits, their_logits, atol=5e-3, rtol=1e-3)
    assert changed > 0.1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 49152


def test_tensors_that_fit_no_module_are_refused(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = {
        f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(2, 64),
        f"{PREFIX}model.layers.9.mlp.up_proj.lora_B.weight": torch.zeros(128, 2),
    }
    with pytest.raises(InvalidRequest, match=r"no module 'model.layers.9.mlp.up_proj'"):
        merge_into_folder(tiny_base("llama"), adapter, 1.0, tmp_path / "merged")


def test_a_folder_with_files_is_not_overwritten(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(InvalidRequest, match="not empty"):
        merge_into_folder(tiny_base("llama"), {}, 1.0, tmp_path)
