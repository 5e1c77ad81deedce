"""The engine on another device than the CPU: what it computes is what the CPU computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmint.engine import engine as engine_module
from openmint.scheduler.work import DropRun, ExportRun, OptimWork, SampleWork, TrainWork
from openmint.types import AdamParams, Datum, Digest, LoraSpec, LossSpec, RunId, Tenant
from openmint.types import SamplingParams as Params
from tests.gpu.conftest import Device
from tests.workbench import Workbench, prompt_of, random_model, reference, train_work

SPECS = {
    "r3": LoraSpec(3, alpha=6.0),
    "r8": LoraSpec(8, train_mlp=False, train_unembed=False),
    "r20": LoraSpec(20, train_attn=False),
}
LENGTHS = (7, 12, 5)
FAMILIES = ["qwen3", "qwen3-moe", "gpt-oss", "deepseek-v3", "glm-5"]
"""Each with something that the others lack: experts, sinks and biases, latents, chosen keys."""


def bench_of(directory: Path, store: Path, device: Device, **config: Any) -> Workbench:
    return Workbench(directory, store, **{"device": device.name, "page_tokens": 4, **config})


def submit_mixed(bench: Workbench) -> tuple[list[int], list[Digest | None]]:
    """Sequences of three adapters and of the base, prefill and decode together."""
    revisions: list[Digest | None] = [
        bench.revision(name, spec, i, 0.2) for i, (name, spec) in enumerate(SPECS.items())
    ]
    asked = [*revisions, None, revisions[0]]
    works = [
        bench.submit(
            SampleWork(Tenant("t"), revision, prompt_of(5 + i, i), Params(4, seed=3), routes=True)
        )
        for i, revision in enumerate(asked)
    ]
    return works, asked


def relative(ours: Any, theirs: Any) -> float:
    return float((ours.cpu() - theirs.cpu()).norm() / theirs.cpu().norm())


@pytest.mark.parametrize("family", [*FAMILIES, "llama", "mistral", "minimax-m2", "glm4-moe"])
def test_the_bases_logprobs_are_those_of_transformers(
    family: str, device: Device, tmp_path: Path
) -> None:
    directory, prompt = random_model(family, tmp_path / "base"), prompt_of(19)
    with device.active():
        bench = bench_of(directory, tmp_path / "store", device, step_tokens=7)
        work = SampleWork(Tenant("t"), None, prompt, Params(8, seed=5), prompt_logprobs=True)
        result = bench.do(work)
    tokens = np.concatenate([prompt, result.sequences[0].tokens_N])
    with torch.no_grad():
        logits = reference(directory)(torch.from_numpy(tokens)[None]).logits[0]
    rows = np.arange(len(tokens) - 1)
    expected = logits.log_softmax(-1).numpy()[rows, tokens[1:]]
    ours = np.concatenate([result.prompt_logprobs_T[1:], result.sequences[0].logprobs_N])
    np.testing.assert_allclose(ours, expected, atol=device.tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_adapters_sample_what_the_cpu_samples(
    family: str, device: Device, tmp_path: Path
) -> None:
    directory = random_model(family, tmp_path / "base")
    with device.active():
        bench = bench_of(directory, tmp_path / "device", device)
        works, asked = submit_mixed(bench)
        bench.run()
    with on_cpu(directory, tmp_path / "cpu") as cpu:
        theirs, _ = submit_mixed(cpu)
        cpu.run()
    for work, their, revision in zip(works, theirs, asked, strict=True):
        ours, expected = bench.result(work), cpu.result(their)
        assert ours.revision == revision
        one, other = ours.sequences[0], expected.sequences[0]
        np.testing.assert_array_equal(one.tokens_N, other.tokens_N)
        np.testing.assert_allclose(one.logprobs_N, other.logprobs_N, atol=device.tolerance)
        assert one.routes == other.routes


@contextmanager
def on_cpu(directory: Path, store: Path) -> Iterator[Workbench]:
    """The plain CPU engine; inside, Triton interprets nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENMINT_TRITON", "0")
        yield Workbench(directory, store, page_tokens=4)


def test_decoded_logprobs_equal_those_of_one_forward_and_of_the_trainer(
    device: Device, tmp_path: Path
) -> None:
    directory, prompt = random_model("qwen3", tmp_path / "base"), prompt_of(11)
    with device.active():
        bench = bench_of(directory, tmp_path / "store", device)
        revision = bench.revision("r", SPECS["r3"], 0, 0.2)
        drawn = bench.sample(prompt, revision, temperature=1.0).sequences[0]
        tokens = np.concatenate([prompt, drawn.tokens_N])
        again = SampleWork(Tenant("t"), revision, tokens, Params(1), prompt_logprobs=True)
        at_once = bench.do(again).prompt_logprobs_T[len(prompt) :]
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)}
        data, loss = (Datum(tokens[:-1], inputs),), LossSpec("cross_entropy")
        trained = bench.do(TrainWork(RunId("r"), Tenant("t"), data, loss, True))
    np.testing.assert_allclose(drawn.logprobs_N, at_once, atol=device.tolerance)
    own = trained.logprobs[0][len(prompt) - 1 :]
    np.testing.assert_allclose(drawn.logprobs_N, own, atol=device.tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_step_gives_each_policy_the_cpus_solo_gradient(
    family: str, device: Device, tmp_path: Path
) -> None:
    directory = random_model(family, tmp_path / "base")
    with device.active():
        mixed = bench_of(directory, tmp_path / "device", device)
        for i, (name, spec) in enumerate(SPECS.items()):
            mixed.submit(train_work(mixed.trained(name, spec, seed=i), "ppo", LENGTHS, seed=i))
        mixed.run()
        together = {name: mixed.engine.runs[RunId(name)].grads_P for name in SPECS}
    with on_cpu(directory, tmp_path / "cpu") as cpu:
        for i, (name, spec) in enumerate(SPECS.items()):
            cpu.do(train_work(cpu.trained(name, spec, seed=i), "ppo", LENGTHS, seed=i))
            alone = cpu.engine.runs[RunId(name)].grads_P
            assert float(alone.norm()) > 0.1
            assert relative(together[name], alone) < device.tolerance


def test_an_update_and_the_way_through_the_store_are_the_cpus(
    device: Device, tmp_path: Path
) -> None:
    directory = random_model("llama", tmp_path / "base")
    with device.active():
        bench = bench_of(directory, tmp_path / "device", device)
        saved, params_P = update_and_save(bench)
        read = bench.sample(prompt_of(9), saved).sequences[0]
    with on_cpu(directory, tmp_path / "cpu") as cpu:
        expected, their_params_P = update_and_save(cpu)
        theirs = cpu.sample(prompt_of(9), expected).sequences[0]
    assert relative(params_P, their_params_P) < device.tolerance
    np.testing.assert_allclose(read.logprobs_N, theirs.logprobs_N, atol=device.tolerance)


def update_and_save(bench: Workbench) -> tuple[Digest, Any]:
    """Train, update, write as a revision, forget; the next sample reads it from the store."""
    run_id = bench.trained("r", LoraSpec(4), seed=0)
    bench.do(train_work(run_id, "cross_entropy", LENGTHS, seed=0))
    bench.do(OptimWork(run_id, Tenant("t"), AdamParams(learning_rate=1e-3, eps=1e-6)))
    params_P = bench.engine.runs[run_id].state.params_P
    saved = bench.do(ExportRun(run_id, Tenant("t"), keep_resident=False))
    bench.do(DropRun(run_id, Tenant("t")))
    return saved.digest, params_P


def test_padded_decode_steps_give_what_plain_ones_give(
    triton_device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they are captured and replayed; interpreted, they only run on the graphs' inputs."""
    directory = random_model("qwen3", tmp_path / "base")
    found = []
    for graphs in (False, True):
        monkeypatch.setattr(engine_module, "use_graphs", lambda device, on=graphs: on)
        bench = bench_of(directory, tmp_path / f"{graphs}", triton_device)
        works, _ = submit_mixed(bench)
        bench.run()
        revision = bench.revision("late", LoraSpec(3, train_unembed=False), 7, 0.2)
        late = bench.sample(prompt_of(8, 8), revision).sequences[0]
        found.append([*(bench.result(work).sequences[0] for work in works), late])
    for plain, padded in zip(*found, strict=True):
        np.testing.assert_array_equal(plain.tokens_N, padded.tokens_N)
        np.testing.assert_allclose(plain.logprobs_N, padded.logprobs_N, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_base_whose_tokens_choose_nothing_is_captured(
    family: str, triton_device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would record no choices."""
    monkeypatch.setattr(engine_module, "use_graphs", lambda device: True)
    bench = bench_of(random_model(family, tmp_path / "base"), tmp_path, triton_device)
    result = bench.do(SampleWork(Tenant("t"), None, prompt_of(11), Params(3), routes=True))
    assert bool(result.sequences[0].routes) == (family != "qwen3")
    (lane,) = bench.engine._sampler._parts
    assert (lane._model is bench.model) == (family != "qwen3")


@pytest.mark.gpu
def test_bf16_on_a_gpu_stays_near_fp32_and_the_trainer_near_the_sampler(tmp_path: Path) -> None:
    """The bounds are guesses until they have been seen on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch finds no device")
    directory, prompt = random_model("qwen3", tmp_path / "base"), prompt_of(48)
    found = []
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        bench = Workbench(directory, tmp_path / device, device=device, dtype=dtype)
        revision = bench.revision("r", LoraSpec(8), 0, 0.05)
        work = SampleWork(Tenant("t"), revision, prompt, Params(32), prompt_logprobs=True)
        result = bench.do(work)
        found.append(result.prompt_logprobs_T[1:])
        drawn = result.sequences[0]
        tokens = np.concatenate([prompt, drawn.tokens_N])
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)}
        data, loss = (Datum(tokens[:-1], inputs),), LossSpec("cross_entropy")
        trained = bench.do(TrainWork(RunId("r"), Tenant("t"), data, loss, True))
        own = trained.logprobs[0][len(prompt) - 1 :]
        assert np.median(np.abs(own - drawn.logprobs_N)) < 0.05
    assert np.median(np.abs(found[0] - found[1])) < 0.1
