"""Bases with experts, latents or chosen keys: from reward to traffic by unmodified clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tinker
from tinker import types

from tests.servers import TestServer, running_server

pytestmark = pytest.mark.integration

FAMILIES = ("qwen3-moe", "deepseek-v3.2")
PROMPTS = [[504, 3575, 282, 4649, 314, 260, 1125, 19 + n] for n in range(4)]
GROUP, LENGTH, UPDATES = 16, 8, 12
PAID = 24576
"""Half of the vocabulary: a token below it is what the reward wants."""


@pytest.fixture(scope="module")
def mixtures(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[[str], Path]
) -> Iterator[TestServer]:
    bases = [str(tiny_base(family)) for family in FAMILIES]
    with running_server(tmp_path_factory.mktemp("mixtures"), bases=bases) as server:
        yield server


class Grpo:
    """Group-relative policy gradients (arXiv:2402.03300), as a client writes them."""

    def __init__(self, service: tinker.ServiceClient, base: str, policy: str) -> None:
        self.run = service.create_lora_training_client(
            base, rank=8, seed=1, user_metadata={"policy": policy}
        ).result()
        self.metrics: list[dict[str, float]] = []

    def step(self, learning_rate: float = 0.1) -> float:
        """One update; the mean reward of what was sampled for it."""
        sampler = self.run.save_weights_and_get_sampling_client().result()
        first_seed = 1000 * len(self.metrics)
        asked = [
            sampler.sample(
                types.ModelInput.from_ints(prompt),
                GROUP,
                types.SamplingParams(
                    max_tokens=LENGTH, temperature=1.0, stop=[], seed=first_seed + 100 * i
                ),
            )
            for i, prompt in enumerate(PROMPTS)
        ]
        data, rewards = [], []
        for prompt, answer in zip(PROMPTS, asked, strict=True):
            sequences = answer.result().sequences
            earned = np.array([np.mean(np.array(s.tokens) < PAID) for s in sequences])
            rewards.append(earned.mean())
            advantages = (earned - earned.mean()) / (earned.std() + 1e-6)
            data += [
                policy_datum(prompt, sequence, reward)
                for sequence, reward in zip(sequences, advantages, strict=True)
            ]
        output = self.run.forward_backward(data, "importance_sampling").result()
        self.metrics.append(output.metrics)
        self.run.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
        return float(np.mean(rewards))


def policy_datum(prompt: list[int], sequence: Any, advantage: float) -> types.Datum:
    tokens = [*prompt, *sequence.tokens]
    num_prompt = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * num_prompt + list(sequence.logprobs),
            "advantages": [0.0] * num_prompt + [advantage] * len(sequence.tokens),
        },
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_learns_by_grpo_and_goes_to_traffic_and_back(
    mixtures: TestServer, family: str
) -> None:
    base, tenant = f"tiny-{family}", f"lab-{FAMILIES.index(family)}"
    key = mixtures.make_key(tenant)
    with tinker.ServiceClient(base_url=mixtures.url, api_key=key) as service:
        grpo = Grpo(service, base, "luck")
        before = grpo.run.save_weights_for_sampler("before").result().path
        rewards = [grpo.step() for _ in range(UPDATES)]
        assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.15, rewards
        for metrics in grpo.metrics:
            # As every sequence is used up in the step after it, nothing is lost.
            assert metrics["replay_recorded_tokens:sum"] == len(PROMPTS) * GROUP * (
                len(PROMPTS[0]) + LENGTH - 1
            )
            assert metrics["replay_missing_tokens:sum"] == 0
            assert metrics["out_of_route_ratio:mean"] == 0
        after = grpo.run.save_weights_for_sampler("after").result().path
        assert before != after
    serve_and_roll_back(mixtures, key, f"{tenant}/luck")


def serve_and_roll_back(server: TestServer, key: str, policy: str) -> None:
    """The newest revision answers, then the first one again; each answer says which did."""
    headers = {"Authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=server.url, headers=headers, timeout=60) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client,
    ):
        path = f"/catalog/v1/policies/{policy}"
        listed = http.get(f"{path}/revisions", params={"limit": 100}).raise_for_status().json()
        newest, oldest = listed["items"][0]["digest"], listed["items"][-1]["digest"]
        for revision in (oldest, newest):
            move = {"revision": revision}
            http.post(f"{path}/aliases/live/promote", json=move).raise_for_status()
        texts, revisions = [], []
        for _ in range(2):
            if revisions:
                http.post(f"{path}/aliases/live/rollback", json={}).raise_for_status()
            answer = client.completions.create(
                model=f"{policy}@live", prompt="Once upon a time", max_tokens=12, temperature=0
            )
            texts.append(answer.choices[0].text)
            revisions.append(answer.model_extra["openmint"]["revision"])
    assert revisions == [newest, oldest]
    assert texts[0] != texts[1]
