"""Each family's adapters as PEFT's files: `peft` computes what we trained, and we what it saved."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

from openmint.engine.formats import encode_revision
from openmint.errors import InvalidRequest
from openmint.layers.adapters import AdapterWeights
from openmint.scheduler.work import ExportRun, SampleWork
from openmint.store.adapter_file import (
    BASE_DTYPES,
    check_adapter,
    encode_adapter,
    expected_tensors,
    from_float32,
)
from openmint.store.expert_files import Experts
from openmint.store.fused_experts import PARAMETERS, has_experts
from openmint.store.peft_file import from_peft, to_peft
from openmint.types import BaseInfo, LoraSpec, RunId, SamplingParams, Tenant
from tests.adapted import AdaptedReference
from tests.workbench import (
    MIXTURES,
    Workbench,
    datum,
    prompt_of,
    random_model,
    reference,
    train_work,
)

pytestmark = pytest.mark.filterwarnings(
    # `peft` names patterns that its first pass, over modules, did not need.
    "ignore:.*_pattern keys did not match:RuntimeWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
LAYOUTS = [(family, each) for family in MIXTURES for each in ("each", "fused")]
LAYOUTS.remove(("gpt-oss", "each"))
SPEC = LoraSpec(4, alpha=6.0)
TOKENS = torch.from_numpy(prompt_of(64))[None]
FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    @cache
    def made(family: str) -> Path:
        return random_model(family, tmp_path_factory.mktemp(family))

    return made


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def random_adapter(base: BaseInfo, dtype: str = "float32") -> bytes:
    rng, kind = np.random.default_rng(0), BASE_DTYPES[dtype]
    tensors = {}
    for name, shape in expected_tensors(base, SPEC).items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        tensors[name] = (kind, shape, from_float32(values, kind))
    return encode_adapter(tensors, base.digest, SPEC)


def loaded_by_peft(folder: Path, files: Mapping[str, bytes], directory: Path, **how: bool) -> Any:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return peft.PeftModel.from_pretrained(reference(folder), directory, **how).eval()


@pytest.mark.parametrize(("family", "experts"), LAYOUTS)
def test_peft_computes_what_was_trained_here(
    family: str, experts: Experts, folder_of: FolderOf, tmp_path: Path
) -> None:
    folder = folder_of(family)
    bench = Workbench(folder, tmp_path / "store")
    run_id = bench.trained("r", SPEC, 0, 0.1)
    saved = bench.do(ExportRun(run_id, Tenant("t"), keep_resident=False))
    files = to_peft(bench.blobs.get(saved.digest), bench.base, experts)
    with torch.no_grad():
        expected = AdaptedReference(folder, bench, RunId("r"))(TOKENS).logits
        unchanged = reference(folder)(TOKENS).logits
        theirs = loaded_by_peft(folder, files, tmp_path / "peft")(TOKENS).logits
    assert relative(theirs, expected) < 1e-5
    assert relative(unchanged, expected) > 0.1, "the adapter must change something"


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_are_those_of_peft(family: str, folder_of: FolderOf, tmp_path: Path) -> None:
    """Experts as parameters, where gate and up have a block each of one B: other places of it are
    values that we don't have."""
    folder = folder_of(family)
    bench = Workbench(folder, tmp_path / "store")
    run_id = bench.trained("r", SPEC, 0, 0.1)
    files = to_peft(
        encode_revision(bench.engine.runs[run_id].weights, bench.base), bench.base, "fused"
    )
    bench.do(train_work(run_id, "cross_entropy", (23,), seed=1))
    model = loaded_by_peft(folder, files, tmp_path / "peft", is_trainable=True)
    example = datum(23, 100, "cross_entropy")
    logits = model(torch.from_numpy(example.tokens_N)[None]).logits[0]
    targets = torch.from_numpy(example.inputs["target_tokens"])[:, None]
    weights = torch.from_numpy(example.inputs["weights"])
    (-(logits.log_softmax(-1).gather(1, targets)[:, 0] * weights).sum()).backward()
    theirs = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    run = bench.engine.runs[run_id]
    ours, is_ours = (
        tensors_of(AdapterWeights(run.layout, values_P), bench.base)
        for values_P in (run.grads_P, torch.ones_like(run.grads_P))
    )
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert relative(grad, theirs[name] * is_ours[name]) < 1e-4, name


def tensors_of(weights: AdapterWeights, base: BaseInfo) -> dict[str, Tensor]:
    files = to_peft(encode_revision(weights, base), base, "fused")
    return safetensors.torch.load(files["adapter_model.safetensors"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "experts"), LAYOUTS)
def test_both_layouts_come_back_to_the_bit(
    family: str, experts: Experts, dtype: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    base = dataclasses.replace(Workbench(folder_of(family), tmp_path).base, dtype=dtype)
    data = random_adapter(base, dtype)
    files = to_peft(data, base, experts)
    config = json.loads(files["adapter_config.json"])
    assert from_peft(files["adapter_model.safetensors"], config, base) == data


def test_gpt_oss_is_exported_as_its_readers_take_it(folder_of: FolderOf, tmp_path: Path) -> None:
    base = Workbench(folder_of("gpt-oss"), tmp_path).base
    data = random_adapter(base)
    assert to_peft(data, base) == to_peft(data, base, "fused")
    with pytest.raises(InvalidRequest, match=r"GptOssForCausalLM one by one; export them 'fused'"):
        to_peft(data, base, "each")


def test_mixtral_is_exported_under_the_names_of_its_checkpoints(
    folder_of: FolderOf, tmp_path: Path
) -> None:
    base = Workbench(folder_of("mixtral"), tmp_path).base
    files = to_peft(random_adapter(base), base)
    names = safetensors.torch.load(files["adapter_model.safetensors"]).keys()
    stem = "base_model.model.model.layers.1.block_sparse_moe.experts.7"
    assert {f"{stem}.{leaf}.lora_A.weight" for leaf in ("w1", "w2", "w3")} <= names
    assert not any("gate_proj" in name for name in names)
    targets = json.loads(files["adapter_config.json"])["target_modules"]
    assert targets == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]


def fused_by_peft(folder: Path, base: BaseInfo, *more: str, **settings: Any) -> Any:
    """`peft` with an adapter of every module that we train, experts as parameters, and of more."""
    beside = [s.name for s in base.stacks if s.group == "mlp" and not has_experts(s)]
    given = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": sorted(
            {stack.name.rpartition(".")[2] for stack in base.stacks if stack.group != "mlp"}
        ),
        "target_parameters": [*PARAMETERS, *(f"{name}.weight" for name in beside), *more],
        **settings,
    }
    config = peft.LoraConfig(task_type="CAUSAL_LM", **given)
    return peft.get_peft_model(reference(folder), config).eval()


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)


def imported(model: Any, base: BaseInfo, directory: Path) -> bytes:
    """Our adapter file of what `peft` saves."""
    model.save_pretrained(directory, save_embedding_layers=False)
    config = json.loads((directory / "adapter_config.json").read_text())
    return from_peft((directory / "adapter_model.safetensors").read_bytes(), config, base)


@pytest.mark.parametrize("rank_of_gate_up", [4, 8])
@pytest.mark.parametrize("family", MIXTURES)
def test_what_peft_saved_computes_the_same_here(
    family: str, rank_of_gate_up: int, folder_of: FolderOf, tmp_path: Path
) -> None:
    """With the A that gate and up share at the others' rank, and at twice that."""
    folder = folder_of(family)
    bench = Workbench(folder, tmp_path / "store")
    patterns = {}
    if rank_of_gate_up > 4:
        patterns = {
            "rank_pattern": {"experts.gate_up_proj": 8},
            "alpha_pattern": {"experts.gate_up_proj": 12},
        }
    model = fused_by_peft(folder, bench.base, **patterns)
    randomise(model)
    data = imported(model, bench.base, tmp_path / "peft")
    spec = check_adapter(data, bench.base).spec
    assert spec == LoraSpec(rank_of_gate_up, alpha=1.5 * rank_of_gate_up)
    work = SampleWork(
        Tenant("t"),
        bench.blobs.put(data),
        TOKENS[0].numpy(),
        SamplingParams(max_tokens=1),
        prompt_logprobs=True,
    )
    ours = bench.do(work).prompt_logprobs_T[1:]
    with torch.no_grad():
        theirs = model(TOKENS).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(ours, theirs.gather(1, TOKENS[0, 1:, None])[:, 0], atol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_one_by_one_are_imported_to_the_bit(
    family: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    base = Workbench(folder_of(family), tmp_path).base
    own_names = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3"}
    own_names["down_proj"] = "w2"
    rng = np.random.default_rng(0)
    tensors, expected = {}, {}
    for stack in base.stacks:
        for place, target in zip(np.ndindex(*stack.grid), stack.targets, strict=True):
            stem = f"base_model.model.{target.path}"
            if family in ("mixtral", "minimax-m2"):
                for usual, own in own_names.items():
                    stem = stem.replace(usual, own)
            a_RI, b_OR = rng.normal(size=(4, target.num_in)), rng.normal(size=(target.num_out, 4))
            tensors[f"{stem}.lora_A.weight"] = torch.from_numpy(a_RI).float()
            tensors[f"{stem}.lora_B.weight"] = torch.from_numpy(b_OR).float()
            expected[f"{stack.name}.lora_A", place] = tensors[f"{stem}.lora_A.weight"]
            expected[f"{stack.name}.lora_B", place] = tensors[f"{stem}.lora_B.weight"].mT
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    ours = safetensors.torch.load(from_peft(safetensors.torch.save(tensors), config, base))
    for (name, place), values in expected.items():
        assert torch.equal(ours[name][place], values), (name, place)


@pytest.mark.parametrize("frozen", ["self_attn.indexer.wq_b", "mlp.gate"])
def test_adapters_of_indexers_and_routers_are_refused_by_name(
    frozen: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    folder = folder_of("deepseek-v3.2")
    base = Workbench(folder, tmp_path / "store").base
    model = fused_by_peft(folder, base, f"{frozen}.weight")
    with pytest.raises(InvalidRequest, match=rf"layers\.2\.{frozen}\.lora_A\.weight: not a tensor"):
        imported(model, base, tmp_path / "peft")


@pytest.mark.parametrize("family", MIXTURES)
def test_each_value_is_that_of_its_own_expert_and_rank(
    family: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    """No two values are equal, and sums of products of whole numbers are exact: one value in the
    place of another shows in the products that `peft` itself computes."""
    folder = folder_of(family)
    base = Workbench(folder, tmp_path / "store").base
    model = fused_by_peft(folder, base, lora_alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 1.0 + torch.arange(parameter.numel()).view_as(parameter)
    data = imported(model, base, tmp_path / "peft")
    ours = safetensors.torch.load(data)
    products = {
        leaf: ours[f"mlp.experts.{leaf}.lora_B"].mT @ ours[f"mlp.experts.{leaf}.lora_A"]
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    wrappers = [m for m in model.modules() if hasattr(m, "parameter_name") and m.num_experts > 1]
    seen = dict.fromkeys(PARAMETERS, 0)
    for wrapper in wrappers:
        delta_EOI = wrapper.get_delta_weight("default")
        experts, name = wrapper.get_base_layer(), wrapper.parameter_name
        layer = seen[f"mlp.experts.{name}"]
        seen[f"mlp.experts.{name}"] += 1
        if experts.is_transposed:
            delta_EOI = delta_EOI.mT
        assert delta_EOI.max() < 2**24, "sums must be exact"
        if name == "down_proj":
            assert torch.equal(delta_EOI, products["down_proj"][layer])
            continue
        half = delta_EOI.shape[1] // 2
        halves = (
            (slice(half), slice(half, None))
            if experts.is_concatenated
            else (
                slice(0, None, 2),
                slice(1, None, 2),
            )
        )
        assert torch.equal(delta_EOI[:, halves[0]], products["gate_proj"][layer])
        assert torch.equal(delta_EOI[:, halves[1]], products["up_proj"][layer])
    (stack,) = (s for s in base.stacks if s.name == "mlp.experts.down_proj")
    assert set(seen.values()) == {stack.grid[0]}


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_experts_that_peft_fuses_by_itself_are_imported(
    family: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    """`target_modules` name them as an older `transformers` had them."""
    folder = folder_of(family)
    bench = Workbench(folder, tmp_path / "store")
    own = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *own],
    )
    model = peft.get_peft_model(reference(folder), config).eval()
    randomise(model)
    data = imported(model, bench.base, tmp_path / "peft")
    assert check_adapter(data, bench.base).spec == LoraSpec(4, alpha=12.0, train_unembed=False)
    again = loaded_by_peft(folder, to_peft(data, bench.base), tmp_path / "again")
    with torch.no_grad():
        assert relative(again(TOKENS).logits, model(TOKENS).logits) < 1e-5
