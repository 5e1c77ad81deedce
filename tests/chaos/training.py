"""A training job through the unmodified Tinker SDK, and what it left behind to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tinker
from tinker import types

from openmint.catalog.address import TinkerPath
from openmint.catalog.catalog import Catalog
from openmint.types import Tenant
from tests.servers import TestServer

VOCAB = 4000
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo")


@dataclass(frozen=True)
class Job:
    """Which policy trains, on what and how long."""

    seed: int
    loss: str
    num_steps: int

    def data(self, step: int) -> list[types.Datum]:
        random = np.random.default_rng([self.seed, step])
        return [self._datum(random, int(random.integers(4, 24))) for _ in range(3)]

    def _datum(self, random: np.random.Generator, length: int) -> types.Datum:
        tokens = [int(token) for token in random.integers(3, VOCAB, length + 1)]
        inputs: dict[str, list[float] | list[int]] = {"target_tokens": tokens[1:]}
        if self.loss == "cross_entropy":
            inputs["weights"] = [1.0] * length
        else:
            inputs["logprobs"] = [-8.0] * length
            inputs["advantages"] = [float(value) for value in random.normal(size=length)]
        prompt = types.ModelInput.from_ints(tokens[:-1])
        return types.Datum(model_input=prompt, loss_fn_inputs=inputs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """What the client was told at each step, and the digests of what it saved at the end."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    state: str
    revision: str


def train(server: TestServer, job: Job) -> Outcome:
    """Two passes and an update a step, several requests ahead of their results."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = service.create_lora_training_client(
            base_model="tiny-llama", rank=4, seed=job.seed
        ).result()
        losses, norms = list[float](), list[float]()
        for step in range(job.num_steps):
            passes = [run.forward_backward(job.data(2 * step + i), job.loss) for i in range(2)]
            update = run.optim_step(types.AdamParams(learning_rate=1e-2))
            losses += [each.result().metrics["loss:sum"] for each in passes]
            norms.append(update.result().metrics["grad_norm:max"])
        saved = run.save_state("end").result().path
        exported = run.save_weights_for_sampler("end").result().path
    digests = [digest_of(server.data, path) for path in (saved, exported)]
    return Outcome(tuple(losses), tuple(norms), *digests)


def digest_of(data: Path, path: str) -> str:
    """Of a checkpoint's bytes."""
    catalog = Catalog.open(f"sqlite:///{data / 'openmint.db'}")
    try:
        at = TinkerPath.parse(path)
        return catalog.checkpoint(Tenant("default"), at.run_id, at.segment, at.name).digest
    finally:
        catalog.close()
