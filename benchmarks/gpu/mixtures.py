"""How do bases with experts, and with latents, train and decode?"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.gpu import adapters, training
from benchmarks.gpu.base import RandomWeights, make_weights
from benchmarks.gpu.bench import MadeAdapters, make_bench, peak_gib, prompts, seconds_of, stored
from benchmarks.gpu.decode import generate
from benchmarks.gpu.scale import Scale
from benchmarks.in_process import TENANT
from openmint.models.loader import DTYPES
from openmint.models.meta import ONE_EXPERT, shapes_of
from openmint.scheduler.work import ExportRun
from openmint.types import IntArray, LoraSpec

TITLE = "Experts and latents"
MEASURED = (
    "At full size: Qwen3-30B-A3B with 12 of its 48 layers, so that four adapters of all experts "
    "train beside it, and DeepSeek-V3 with 4 of its 61 layers and 32 of its 256 experts; random "
    "weights, drawn on the device, so routers choose about evenly. Training: one step of packed "
    "sequences, adapters (rank 16) on all layers and experts but the output layer. Decode: every "
    "sequence with an adapter of its own, against the bare base; steps are launched one by one, "
    "not as a graph. One adapter: its run is exported to a store, read from there, and asked for a "
    "token. Latents: greedy decode of the bare base, against `transformers` with its own cache on "
    "the same weights; the gap is that of the first token's log-probability."
)


def rows(scale: Scale) -> Iterator[dict[str, Any]]:
    experts = with_shape(scale, scale.mixtures.experts)
    yield from training_rows(experts)
    free_memory(scale)
    yield from decode_rows(experts)
    free_memory(scale)
    yield from latent_rows(with_shape(scale, scale.mixtures.latents))


def with_shape(scale: Scale, shape: dict[str, Any]) -> Scale:
    size = scale.mixtures
    worker = {**scale.worker, **size.worker}
    return replace(
        scale,
        shape=shape,
        worker=worker,
        rank=size.adapters.rank,
        training=size.training,
        adapters=size.adapters,
    )


def free_memory(scale: Scale) -> None:
    """What the last bench held."""
    gc.collect()
    if torch.device(scale.device).type == "cuda":
        torch.cuda.empty_cache()


def training_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    """Training, then export and packed load of one adapter."""
    with TemporaryDirectory() as folder:
        bench = make_bench(scale, stored(Path(folder)))
        for num_policies in scale.training.policies:
            row = training.measure(bench, scale, num_policies)
            del row["flops"]  # not all experts compute for a token
            peak = peak_gib(scale.device)
            yield {"table": "experts, training", **row, "peak memory, GiB": peak}
        run_id = bench.make_run("one", LoraSpec(scale.rank, train_unembed=False), seed=0)
        export, saved = seconds_of(
            scale.device, lambda: bench.do(ExportRun(run_id, TENANT, keep_resident=False))
        )
        bench.engine.drop_run(run_id)
        read, weights = seconds_of(scale.device, lambda: bench.archive.load_revision(saved.digest))
        prompt_T = prompts(1, scale.adapters.tokens_in, bench.base.vocab_size, seed=0)[0]
        first, _ = seconds_of(scale.device, lambda: bench.sample(prompt_T, 1, saved.digest))
        again, _ = seconds_of(scale.device, lambda: bench.sample(prompt_T, 1, saved.digest))
        yield {
            "table": "experts, one adapter",
            "rank": scale.rank,
            "MB": weights.num_bytes / 1e6,
            "export, s": export,
            "read, s": read,
            "first token with its load, s": first,
            "first token, loaded, s": again,
        }


def decode_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    spec = LoraSpec(scale.rank, train_unembed=False)
    bench = make_bench(scale, partial(MadeAdapters, spec))
    for batch, counts in scale.adapters.batches.items():
        for count in counts:
            step, gap = adapters.measure(bench, scale, batch, count)
            yield {
                "table": "experts, decode",
                "sequences": batch,
                "distinct adapters": count,
                "ms a step": 1000 * step,
                "tokens/s": batch / step,
                "alone: largest gap": gap,
                "peak memory, GiB": peak_gib(scale.device),
            }


def latent_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    size = scale.mixtures.latent_decoding
    with TemporaryDirectory() as folder:
        bench = make_bench(scale, stored(Path(folder)))
        theirs = Transformers(scale)
        for batch in size.batches:
            laps = []
            for seed in range(scale.repeats + 1):
                rows_ST = prompts(batch, size.tokens_in, bench.base.vocab_size, seed)
                log, results = generate(bench, rows_ST, size.tokens_out)
                seconds, drawn = log.decode
                their_step, their_logprobs_S = theirs.decode(rows_ST, size.tokens_out)
                ours_S = np.array([result.sequences[0].logprobs_N[0] for result in results])
                gap = float(np.abs(ours_S - their_logprobs_S).max())
                laps.append((seconds / (drawn / batch), their_step, gap))
            step, their_step = (statistics.median(lap[i] for lap in laps[1:]) for i in (0, 1))
            yield {
                "table": "latents, decode",
                "sequences": batch,
                "tokens cached": size.tokens_in,
                "ms a step": 1000 * step,
                "transformers, ms a step": 1000 * their_step,
                "faster": their_step / step,
                "largest gap": max(lap[2] for lap in laps),
                "peak memory, GiB": peak_gib(scale.device),
            }


class Transformers:
    """Their model with the weights of our random base."""

    def __init__(self, scale: Scale) -> None:
        weights, config = make_weights(scale)
        with torch.device(scale.device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[scale.dtype])
        self._model, self._device = model.eval(), scale.device
        tensors = model.state_dict()
        for name in shapes_of(config):
            tensors[name].copy_(drawn(weights, name, tensors[name]))

    @torch.no_grad()
    def decode(self, rows_ST: IntArray, tokens_out: int) -> tuple[float, Any]:
        """Seconds of a step, and the log-probabilities of the first tokens drawn, greedy."""
        out = self._model(torch.from_numpy(rows_ST).to(self._device), logits_to_keep=1)
        first_SV = out.logits[:, -1].float().log_softmax(-1)
        state = [out.logits[:, -1:].argmax(-1), out.past_key_values]

        def steps() -> None:
            for _ in range(tokens_out - 1):
                out = self._model(state[0], past_key_values=state[1])
                state[0] = out.logits.argmax(-1)

        seconds, _ = seconds_of(self._device, steps)
        return seconds / (tokens_out - 1), first_SV.max(-1).values.cpu().numpy()


def drawn(weights: RandomWeights, name: str, like: Tensor) -> Tensor:
    """Our tensor of this name; of experts, whose stack has theirs, one after another."""
    module, _, leaf = name.rpartition(".")
    if not module.endswith(".experts"):
        return weights.exact(name) if like.dtype == torch.float32 else weights[name]
    sides = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
    names = [[f"{module}.{e}.{side}_proj.weight" for side in sides] for e in range(len(like))]
    assert all(ONE_EXPERT.fullmatch(each) for own in names for each in own)
    return torch.stack([torch.cat([weights[each] for each in own]) for own in names])
