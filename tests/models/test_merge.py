"""A merged folder computes what PEFT does after its merge, or base and adapter by definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from openmint.errors import InvalidRequest
from openmint.models.merge import PREFIX, merge_into_folder
from openmint.models.weights import SINGLE
from openmint.scheduler.work import ExportRun
from openmint.store.expert_files import Experts
from openmint.store.peft_file import to_peft
from openmint.types import LoraSpec, RunId, Tenant
from tests.adapted import AdaptedReference
from tests.quantized import published
from tests.workbench import MIXTURES, Workbench, prompt_of, random_model, reference

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


def coarse(values: torch.Tensor) -> torch.Tensor:
    """Multiples of 1/64 that bf16 has exactly, and their sums with others like them."""
    return (values.clamp(-1.5, 1.5) * 64).round() / 64


def coarse_model(family: str, directory: Path) -> Path:
    file = random_model(family, directory) / "model.safetensors"
    tensors = load_file(file)
    for name in tensors.keys() - {n for n in tensors if n.endswith("e_score_correction_bias")}:
        tensors[name] = coarse(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    return directory


def coarsen(bench: Workbench, run_id: RunId) -> None:
    """A of -1, 0 and 1, few of them, and B of small multiples of 1/64."""
    run = bench.engine.runs[run_id]
    generator = torch.Generator().manual_seed(3)
    params_P = run.state.params_P.clone()
    for a_RI, b_RO in run.layout.views(params_P).values():
        a_RI.copy_(torch.randint(-3, 4, a_RI.shape, generator=generator).div(3).trunc())
        b_RO.copy_(torch.randint(-3, 4, b_RO.shape, generator=generator) / 64)
    run.set_state(type(run.state).fresh(params_P))


LAYOUTS = [(family, each) for family in MIXTURES for each in ("each", "fused")]
LAYOUTS.remove(("gpt-oss", "each"))


@pytest.mark.parametrize(("family", "experts"), LAYOUTS)
def test_experts_are_merged_from_either_layout(
    family: str, experts: Experts, tmp_path: Path
) -> None:
    """All sums are numbers that bf16 has, so that nothing is lost where one is in its place."""
    base = coarse_model(family, tmp_path / "base")
    bench = Workbench(base, tmp_path / "store")
    run_id = bench.trained("r", LoraSpec(2, alpha=2.0), 0)
    coarsen(bench, run_id)
    saved = bench.do(ExportRun(run_id, Tenant("t"), keep_resident=False))
    files = to_peft(bench.blobs.get(saved.digest), bench.base, experts)
    merge_into_folder(base, load(files["adapter_model.safetensors"]), 1.0, tmp_path / "merged")

    tokens = torch.from_numpy(prompt_of(64))[None]
    with torch.no_grad():
        ours = reference(tmp_path / "merged")(tokens).logits
        expected = AdaptedReference(base, bench, run_id)(tokens).logits
        unmerged = reference(base)(tokens).logits
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    assert (unmerged - expected).norm() > 0.1 * expected.norm()
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(before[name], after[name]) for name in biases)
    served = Workbench(tmp_path / "merged", tmp_path / "merged-store")
    assert served.base.stacks == bench.base.stacks


@pytest.mark.parametrize("family", ["qwen3", "minimax-m2", "deepseek-v3", "gpt-oss"])
def test_a_quantized_base_is_merged_as_the_dequantized_one_is(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = published(family, tmp_path, monkeypatch)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    bench = Workbench(plain, tmp_path / "store")
    run_id = bench.trained("r", LoraSpec(2, alpha=2.0), 0)
    coarsen(bench, run_id)
    saved = bench.do(ExportRun(run_id, Tenant("t"), keep_resident=False))
    files = to_peft(bench.blobs.get(saved.digest), bench.base, "fused")
    adapter = load(files["adapter_model.safetensors"])
    for base, target in ((folder, "merged"), (plain, "expected")):
        merge_into_folder(base, adapter, 1.0, tmp_path / target)
    ours, theirs = (load_file(tmp_path / each / SINGLE) for each in ("merged", "expected"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    served = Workbench(tmp_path / "merged", tmp_path / "merged-store")
    assert served.base.stacks == bench.base.stacks
    assert served.base.eos_token_ids == (2, 7)


def test_tensors_that_fit_no_module_are_refused(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = {
        f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(2, 64),
        f"{PREFIX}model.layers.9.mlp.up_proj.lora_B.weight": torch.zeros(128, 2),
    }
    with pytest.raises(InvalidRequest, match=r"no module 'model.layers.9.mlp.up_proj'"):
        merge_into_folder(tiny_base("llama"), adapter, 1.0, tmp_path / "merged")


@pytest.mark.parametrize(
    ("path", "rank", "why"),
    [
        ("mlp.experts", 9, "aren't those of 8 experts"),
        ("mlp.experts.8.down_proj", 1, r"no module 'model.layers.0.mlp.experts.8.down_proj'"),
        ("mlp.experts.0.gate", 1, r"no module 'model.layers.0.mlp.experts.0.gate'"),
    ],
)
def test_experts_that_the_base_does_not_have_are_refused(
    path: str, rank: int, why: str, tmp_path: Path
) -> None:
    base = random_model("olmoe", tmp_path / "base")
    stem = f"{PREFIX}model.layers.0.{path}"
    adapter = {f"{stem}.lora_A.weight": torch.zeros(rank, 48)}
    adapter |= {f"{stem}.lora_B.weight": torch.zeros(32, rank)}
    with pytest.raises(InvalidRequest, match=why):
        merge_into_folder(base, adapter, 1.0, tmp_path / "merged")


def test_a_folder_with_files_is_not_overwritten(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(InvalidRequest, match="not empty"):
        merge_into_folder(tiny_base("llama"), {}, 1.0, tmp_path)
