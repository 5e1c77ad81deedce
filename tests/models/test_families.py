"""Families with experts, latents or chosen keys compute, and train, what `transformers` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmint.layers.attention import PackedAttention
from openmint.layers.batch import Batch
from openmint.scheduler.work import SampleWork
from openmint.types import LoraSpec, RunId, SamplingParams, Tenant
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

LENGTHS = (23, 11, 1, 17)
SPECS = {
    "one": LoraSpec(4),
    "two": LoraSpec(8, alpha=16.0),
    "three": LoraSpec(3, train_attn=False),
    "four": LoraSpec(5, train_mlp=False, train_unembed=False),
}


@pytest.fixture(params=MIXTURES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(request.param, tmp_path_factory.mktemp("base"))


def relative(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def test_packed_logits_equal_transformers(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder, tmp_path)
    prompts = [torch.from_numpy(prompt_of(length, length)) for length in LENGTHS]
    attention = PackedAttention(LENGTHS, torch.device("cpu"))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        hidden = bench.model.forward(torch.cat(prompts), positions, Batch(attention, None))
        ours = bench.model.head(hidden, None)
        theirs = torch.cat([reference(folder)(p[None]).logits[0] for p in prompts])
    assert relative(ours, theirs) < 1e-5


def test_greedy_continuation_equals_transformers_generate(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder, tmp_path)
    prompt = prompt_of(13)
    generated = reference(folder).generate(
        torch.from_numpy(prompt)[None], max_new_tokens=20, do_sample=False
    )
    ours = bench.sample(prompt, max_tokens=20).sequences[0].tokens_N
    np.testing.assert_array_equal(ours, generated[0, 13:].numpy())


def test_gradients_of_mixed_policies_equal_autograd_through_transformers(
    folder: Path, tmp_path: Path
) -> None:
    bench = Workbench(folder, tmp_path)
    ids = {}
    for seed, (name, spec) in enumerate(SPECS.items()):
        run_id = bench.trained(name, spec, seed, 0.1)
        ids[name] = bench.submit(train_work(run_id, "cross_entropy", LENGTHS, seed))
    bench.run()
    for seed, name in enumerate(SPECS):
        model = AdaptedReference(folder, bench, RunId(name))
        result = bench.result(ids[name])
        for i, length in enumerate(LENGTHS):
            example = datum(length, seed * 100 + i, "cross_entropy")
            logits = model(torch.from_numpy(example.tokens_N)[None]).logits[0]
            targets = torch.from_numpy(example.inputs["target_tokens"])
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            np.testing.assert_allclose(result.logprobs[i], logprobs.detach(), atol=1e-4)
            (-(logprobs * torch.from_numpy(example.inputs["weights"])).sum()).backward()
        run = bench.engine.runs[RunId(name)]
        expected = model.gradients()
        for path, pair in run.layout.views(run.grads_P).items():
            for ours, theirs in zip(pair, expected[path], strict=True):
                assert relative(ours, theirs) < 1e-4, path


def test_sampled_logprobs_equal_the_trainers_and_the_references(
    folder: Path, tmp_path: Path
) -> None:
    """Cached and in small chunks against uncached and whole."""
    bench = Workbench(folder, tmp_path, page_tokens=4, step_tokens=7)
    revision = bench.revision("r", LoraSpec(8), 0, 0.1)
    prompt = prompt_of(17)
    given = SamplingParams(max_tokens=9, seed=5)
    result = bench.do(SampleWork(Tenant("t"), revision, prompt, given, prompt_logprobs=True))
    tokens = np.concatenate([prompt, result.sequences[0].tokens_N])
    with torch.no_grad():
        logits = AdaptedReference(folder, bench, RunId("r"))(torch.from_numpy(tokens)[None]).logits
        plain = reference(folder)(torch.from_numpy(tokens)[None]).logits
    theirs, base = (x[0].log_softmax(-1).numpy() for x in (logits, plain))
    rows = np.arange(len(tokens) - 1), tokens[1:]
    np.testing.assert_allclose(result.sequences[0].logprobs_N, theirs[rows][16:], atol=1e-4)
    np.testing.assert_allclose(result.prompt_logprobs_T[1:], theirs[rows][:16], atol=1e-4)
    assert np.abs(theirs[rows] - base[rows]).max() > 1e-2, "the adapter must change something"


def test_mixed_adapters_sample_what_each_samples_alone(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder, tmp_path)
    revisions = [bench.revision(n, spec, i, 0.2) for i, (n, spec) in enumerate(SPECS.items())]
    prompt = prompt_of(9)
    alone = [bench.sample(prompt, revision).sequences[0].tokens_N for revision in revisions]
    given = SamplingParams(max_tokens=12, temperature=0.0)
    works = [bench.submit(SampleWork(Tenant("t"), r, prompt, given)) for r in revisions]
    bench.run()
    for work, expected in zip(works, alone, strict=True):
        np.testing.assert_array_equal(bench.result(work).sequences[0].tokens_N, expected)
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_targets_are_the_linears_and_experts_of_the_family(folder: Path, tmp_path: Path) -> None:
    """All but routers and indexers, which are frozen."""
    modules = dict(reference(folder).named_modules())
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) and ".indexer." not in name
    }
    for name, module in modules.items():
        if name.endswith(".experts"):
            inner = module.intermediate_size if hasattr(module, "intermediate_size") else None
            inner, hidden = inner or module.intermediate_dim, 32
            for expert in range(8):
                linears[f"{name}.{expert}.gate_proj"] = (hidden, inner)
                linears[f"{name}.{expert}.up_proj"] = (hidden, inner)
                linears[f"{name}.{expert}.down_proj"] = (inner, hidden)
    bench = Workbench(folder, tmp_path)
    ours = {t.path: (t.num_in, t.num_out) for stack in bench.base.stacks for t in stack.targets}
    assert ours == linears
