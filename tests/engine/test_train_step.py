"""Gradients: those of `peft`, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmint.engine.train_step import OpenTrain
from openmint.errors import InvalidRequest
from openmint.scheduler.work import ExportRun, OptimWork, TrainWork
from openmint.types import AdamParams, Datum, LoraSpec, LossSpec, RunId, Tenant
from tests.workbench import (
    FAMILIES,
    Workbench,
    datum,
    peft_model,
    prompt_of,
    random_model,
    train_work,
)

POLICIES: list[tuple[str, LoraSpec, str, dict[str, float]]] = [
    ("r1", LoraSpec(1, train_mlp=False, train_unembed=False), "importance_sampling", {}),
    ("r8", LoraSpec(8), "cross_entropy", {}),
    (
        "r16",
        LoraSpec(16, train_attn=False),
        "ppo",
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    ),
    ("r64", LoraSpec(64, train_unembed=False), "dro", {"beta": 0.1}),
    (
        "r3",
        LoraSpec(3, alpha=6.0),
        "cispo",
        {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    ),
]
LENGTHS = (7, 12, 5)


def by_formula(loss: str, config: dict[str, float], lp: Any, inputs: dict[str, Any]) -> Any:
    """The losses as the protocol page writes them, independent of `openmint.losses`."""
    if loss == "cross_entropy":
        return (-lp * inputs["weights"]).sum()
    a, q = inputs["advantages"], inputs["logprobs"]
    r = torch.exp(lp - q)
    if loss == "importance_sampling":
        return -(r * a).sum()
    if loss == "ppo":
        clipped = torch.clip(r, config["clip_low_threshold"], config["clip_high_threshold"])
        return -torch.minimum(r * a, clipped * a).sum()
    if loss == "cispo":
        clipped = torch.clip(r, config["clip_low_threshold"], config["clip_high_threshold"])
        return -(clipped.detach() * lp * a).sum()
    return -(lp * a - 0.5 * config["beta"] * (lp - q) ** 2).sum()


def reference_gradients(
    model: Any, work: TrainWork, config: dict[str, float]
) -> tuple[dict[str, Any], float, list[Any]]:
    """Gradients, loss and log-probabilities of `peft` on one policy alone."""
    total, logprobs = torch.zeros(()), []
    for item in work.data:
        logits = model(torch.from_numpy(item.tokens_N)[None]).logits[0]
        targets = torch.from_numpy(item.inputs["target_tokens"])[:, None]
        lp = logits.log_softmax(-1).gather(1, targets)[:, 0]
        inputs = {name: torch.from_numpy(value) for name, value in item.inputs.items()}
        total = total + by_formula(work.loss.name, config, lp, inputs)
        logprobs.append(lp.detach().numpy())
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads, total.item(), logprobs


def relative(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_five_mixed_policies_equal_peft_each_alone(
    family: str, tmp_path: Path
) -> None:
    bench = Workbench(random_model(family, tmp_path / "base"), tmp_path / "store")
    works = {}
    for i, (name, spec, loss, config) in enumerate(POLICIES):
        run_id = bench.trained(name, spec, seed=i)
        works[name] = train_work(run_id, loss, LENGTHS, seed=i, **config)
    ids = {name: bench.submit(work) for name, work in works.items()}
    bench.run()
    assert bench.scheduler.stats().trained_tokens == len(POLICIES) * sum(LENGTHS)
    for name, _, _, config in POLICIES:
        model = peft_model(tmp_path / "base", bench, RunId(name))
        theirs, loss, logprobs = reference_gradients(model, works[name], config)
        result = bench.result(ids[name])
        assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-4)
        for ours, expected in zip(result.logprobs, logprobs, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-4)
        run = bench.engine.runs[RunId(name)]
        for path, (a_RI, b_RO) in run.layout.views(run.grads_P).items():
            prefix = f"base_model.model.{path}"
            assert relative(a_RI, theirs[f"{prefix}.lora_A.default.weight"]) < 1e-4
            assert relative(b_RO.t(), theirs[f"{prefix}.lora_B.default.weight"]) < 1e-4


def test_mixed_step_gives_each_policy_its_solo_gradient(tmp_path: Path) -> None:
    directory = random_model("llama", tmp_path / "base")
    mixed = Workbench(directory, tmp_path / "mixed")
    solo = Workbench(directory, tmp_path / "solo")
    for i, (name, spec, loss, config) in enumerate(POLICIES):
        mixed.trained(name, spec, seed=i)
        solo.trained(name, spec, seed=i)
        solo.do(train_work(RunId(name), loss, LENGTHS, seed=i, **config))
    for i, (name, _, loss, config) in enumerate(POLICIES):
        mixed.submit(train_work(RunId(name), loss, LENGTHS, seed=i, **config))
    mixed.run()
    for name, *_ in POLICIES:
        together, alone = (bench.engine.runs[RunId(name)].grads_P for bench in (mixed, solo))
        assert float(alone.norm()) > 0.1
        assert relative(together, alone) < 1e-5


def test_policies_of_one_step_do_share_micro_batches(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    seen = []
    original = bench.engine.train
    bench.engine.train = lambda plan: (seen.append(plan), original(plan))[1]  # type: ignore[method-assign]
    runs = [bench.trained(name, spec, seed=i) for i, (name, spec, _, _) in enumerate(POLICIES)]
    for i, (run_id, (_, _, loss, config)) in enumerate(zip(runs, POLICIES, strict=True)):
        bench.submit(train_work(run_id, loss, LENGTHS, i, **config))
    bench.run()
    assert len(seen) == 1
    assert len({item.work_id for item in seen[0].items}) == len(POLICIES)


def test_two_backwards_and_one_step_equal_one_with_all_the_data(tmp_path: Path) -> None:
    directory = random_model("qwen3", tmp_path / "base")
    halves = Workbench(directory, tmp_path / "halves", micro_batch_tokens=16)
    whole = Workbench(directory, tmp_path / "whole")
    data = tuple(datum(length, i, "cross_entropy") for i, length in enumerate((9, 14, 6, 11)))
    for bench, parts in ((halves, (data[:2], data[2:])), (whole, (data,))):
        run_id = bench.trained("r", LoraSpec(8), seed=0)
        for part in parts:
            bench.do(TrainWork(run_id, Tenant("t"), part, LossSpec("cross_entropy"), False))
        bench.do(OptimWork(run_id, Tenant("t"), AdamParams(learning_rate=1e-3)))
    ours, theirs = (b.engine.runs[RunId("r")].state.params_P for b in (halves, whole))
    # Adam's first step is nearly a sign, so tiny gradients amplify rounding: compare updates.
    assert float((ours - theirs).abs().max()) < 1e-5


def test_candidate_targets_give_a_distribution_loss(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    run_id = bench.trained("r", LoraSpec(4), seed=0)
    random = np.random.default_rng(0)
    targets, weights = random.integers(3, 160, (9, 4)), random.random((9, 4)).astype(np.float32)
    item = Datum(prompt_of(9), {"target_tokens": targets, "weights": weights})
    narrow = datum(5, 1, "cross_entropy")
    result = bench.do(
        TrainWork(run_id, Tenant("t"), (item, narrow), LossSpec("cross_entropy"), False)
    )
    logits = peft_model(tmp_path / "base", bench, run_id)(torch.from_numpy(item.tokens_N)[None])
    expected = logits.logits[0].log_softmax(-1).gather(1, torch.from_numpy(targets))
    np.testing.assert_allclose(result.logprobs[0], expected.detach().numpy(), atol=1e-4)
    assert result.logprobs[1].shape == (5,)


def test_forward_only_leaves_no_gradient(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    run_id = bench.trained("r", LoraSpec(4), seed=0)
    result = bench.do(train_work(run_id, "cross_entropy", LENGTHS, 0, forward_only=True))
    assert [len(row) for row in result.logprobs] == list(LENGTHS)
    assert not bench.engine.runs[run_id].has_gradient


def test_overflowing_loss_is_refused_and_the_run_goes_on_unharmed(tmp_path: Path) -> None:
    bench = Workbench(random_model("llama", tmp_path / "base"), tmp_path / "store")
    run_id = bench.trained("r", LoraSpec(4), seed=0)
    other = bench.trained("other", LoraSpec(4), seed=1)
    good = train_work(run_id, "cross_entropy", LENGTHS, 0)
    bench.do(good)
    before = bench.engine.runs[run_id].grads_P.clone()
    bad = train_work(run_id, "importance_sampling", LENGTHS, 1)
    for item in bad.data:
        item.inputs["logprobs"][:] = -1e30
    bad_id, good_id = bench.submit(bad), bench.submit(train_work(other, "ppo", LENGTHS, 2))
    bench.run()
    with pytest.raises(InvalidRequest, match="NaN or infinite"):
        bench.result(bad_id)
    assert np.isfinite(bench.result(good_id).metrics["loss:sum"])
    assert torch.isfinite(bench.engine.runs[other].grads_P).all()
    assert torch.equal(bench.engine.runs[run_id].grads_P, before)
    bench.do(OptimWork(run_id, Tenant("t"), AdamParams()))


def test_exported_adapter_in_peft_reproduces_the_trainers_logprobs(tmp_path: Path) -> None:
    import peft

    from openmint.store.peft_file import to_peft
    from tests.workbench import reference

    bench = Workbench(random_model("qwen2", tmp_path / "base"), tmp_path / "store")
    run_id = bench.trained("r", LoraSpec(8), seed=3)
    saved = bench.do(ExportRun(run_id, Tenant("t"), keep_resident=False))
    folder = tmp_path / "peft"
    folder.mkdir()
    for name, data in to_peft(bench.blobs.get(saved.digest), bench.base).items():
        (folder / name).write_bytes(data)
    model = peft.PeftModel.from_pretrained(reference(tmp_path / "base"), folder)
    work = train_work(run_id, "cross_entropy", LENGTHS, 0, forward_only=True)
    for item, ours in zip(work.data, bench.do(work).logprobs, strict=True):
        logits = model(torch.from_numpy(item.tokens_N)[None]).logits[0]
        targets = torch.from_numpy(item.inputs["target_tokens"])[:, None]
        theirs = logits.log_softmax(-1).gather(1, targets)[:, 0]
        np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)


def test_open_train_fills_in_the_losss_defaults() -> None:
    work = OpenTrain(None, (), LossSpec("ppo", {"clip_high_threshold": 1.5}), False)  # type: ignore[arg-type]
    assert work.config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5}
