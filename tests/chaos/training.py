"""A training job through the unmodified Tinker SDK, and what it left behind, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.numpy
import tinker
from tinker import types

from openmint.catalog.address import TinkerPath
from openmint.catalog.catalog import Catalog
from openmint.store.folder_store import FolderStore
from openmint.types import Digest, Tenant
from tests.servers import TestServer

VOCAB = 4000
STEPS_PER_SAVE = 4
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo")
T = Tenant("default")


@dataclass(frozen=True)
class Job:
    """Which policy trains, and on what."""

    seed: int
    loss: str
    learning_rate: float = 1e-2

    @property
    def policy(self) -> str:
        return f"{self.loss.replace('_', '-')}-{self.seed}"

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


@dataclass
class Outcome:
    """Everything that the client was told, and the paths that it was given."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    drawn: list[list[int]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return len(self.grad_norms)


def train(server: TestServer, job: Job, goes_on: Callable[[int], bool]) -> Outcome:
    """Two passes and an update a step, several requests ahead of their results; now and then a
    state and a revision are saved, and the weights as they are sampled from."""
    told = Outcome()
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = service.create_lora_training_client(
            base_model="tiny-llama",
            rank=4,
            seed=job.seed,
            user_metadata={"policy": job.policy},
        ).result()
        while goes_on(told.num_steps):
            step = told.num_steps
            passes = [run.forward_backward(job.data(2 * step + i), job.loss) for i in range(2)]
            update = run.optim_step(types.AdamParams(learning_rate=job.learning_rate))
            told.losses += [each.result().metrics["loss:sum"] for each in passes]
            told.grad_norms.append(update.result().metrics["grad_norm:max"])
            if step % STEPS_PER_SAVE == 0:
                told.paths.append(run.save_state(f"state-{step}").result().path)
                told.paths.append(run.save_weights_for_sampler(f"step-{step}").result().path)
                told.drawn.append(_sample(run))
        told.paths.append(run.save_state("end").result().path)
        told.paths.append(run.save_weights_for_sampler("end").result().path)
    return told


def _sample(run: tinker.TrainingClient) -> list[int]:
    sampler = run.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=12, seed=5, stop=[])
    prompt = types.ModelInput.from_ints([504, 3575, 282])
    return list(sampler.sample(prompt, 1, params).result().sequences[0].tokens)


def digests_of(data: Path, paths: list[str]) -> list[str]:
    """Of the bytes of checkpoints. Raises NotFound for one that isn't there."""
    catalog = Catalog.open(f"sqlite:///{data / 'openmint.db'}")
    try:
        found = []
        for path in paths:
            at = TinkerPath.parse(path)
            found.append(catalog.checkpoint(T, at.run_id, at.segment, at.name).digest)
        return [str(digest) for digest in found]
    finally:
        catalog.close()


def latest_of(data: Path, policy: str) -> str:
    """The digest that the policy's alias `latest` names."""
    catalog = Catalog.open(f"sqlite:///{data / 'openmint.db'}")
    try:
        return str(catalog.alias(T, policy, "latest").digest)
    finally:
        catalog.close()


def state_of(data: Path, path: str) -> dict[str, np.ndarray]:
    """The tensors of a saved training state."""
    (digest,) = digests_of(data, [path])
    return safetensors.numpy.load(bytes(FolderStore(data).get(Digest(digest))))
