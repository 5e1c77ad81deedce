"""Every dense family computes what its `transformers` class computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openmint.config import WorkerConfig
from openmint.errors import InvalidRequest
from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.models.loader import load_model
from openmint.types import Digest
from tests.workbench import FAMILIES, Workbench, prompt_of, random_model, reference

LENGTHS = (23, 11, 1, 17)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    bench = Workbench(random_model(family, tmp_path / "base"), tmp_path / "store")
    prompts = [torch.from_numpy(prompt_of(length, length)) for length in LENGTHS]
    attention = PackedAttention(LENGTHS, torch.device("cpu"))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        hidden = bench.model.forward(torch.cat(prompts), positions, Batch(attention, None))
        ours = bench.model.head(hidden, None)
        theirs = torch.cat([reference(tmp_path / "base")(p[None]).logits[0] for p in prompts])
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation_equals_transformers_generate(family: str, tmp_path: Path) -> None:
    bench = Workbench(random_model(family, tmp_path / "base"), tmp_path / "store")
    prompt = prompt_of(13)
    model = reference(tmp_path / "base")
    generated = model.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=20, do_sample=False, eos_token_id=-1
    )
    ours = bench.sample(prompt, max_tokens=20).sequences[0].tokens_N
    np.testing.assert_array_equal(ours, generated[0, 13:].numpy())


def test_targets_name_every_linear_of_the_family(tmp_path: Path) -> None:
    bench = Workbench(random_model("qwen3", tmp_path / "base"), tmp_path / "store")
    modules = dict(reference(tmp_path / "base").named_modules())
    linears = {n: m for n, m in modules.items() if isinstance(m, torch.nn.Linear)}
    ours = {t.path: (t.num_in, t.num_out) for stack in bench.base.stacks for t in stack.targets}
    assert ours == {n: (m.in_features, m.out_features) for n, m in linears.items()}


def test_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match=r"GPT2LMHeadModel.*supported: .*LlamaForCausalLM"):
        load_model("gpt2", tmp_path, Digest("sha256:0"), WorkerConfig())


def test_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    random_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidRequest, match=r"neither model\.safetensors nor"):
        load_model("tiny", tmp_path, Digest("sha256:0"), WorkerConfig())
