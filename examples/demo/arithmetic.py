"""acme's policy: sums up to 20 + 20, learned by GRPO from nothing but "is the answer right?".

The prompt is a text to continue, with one worked example, so that the base knows the form. The
400 sums are split once: what is held out for the score is never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tinker
from tinker import types

LARGEST = 20
EXAMPLE = "7 + 4 = 11\n"
STOP = "\n"
MAX_ANSWER_TOKENS = 5

Sum = tuple[int, int]


@dataclass(frozen=True)
class GrpoSettings:
    """One step asks `num_prompts` sums `group_size` times each and makes one update."""

    num_steps: int
    num_prompts: int = 16
    group_size: int = 8
    learning_rate: float = 3e-4
    rank: int = 8


@dataclass(frozen=True)
class GrpoStep:
    """What one step did; `reward` is the share of right answers before its update."""

    number: int
    reward: float
    num_trained_tokens: int
    num_sampled_tokens: int


def split_sums(num_held_out: int, seed: int) -> tuple[list[Sum], list[Sum]]:
    """(training sums, held-out sums), disjoint."""
    sums = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(seed).shuffle(sums)
    return sums[num_held_out:], sums[:num_held_out]


def prompt_of(a: int, b: int) -> str:
    return f"{EXAMPLE}{a} + {b} ="


def is_right(completion: object, answer: int) -> bool:
    """The reward. A completion is right when it is the number and nothing else."""
    return str(completion).strip() == str(answer)


def evaluation_task(held_out: list[Sum]) -> dict[str, object]:
    """The task that the service scores: greedy, exact answer."""
    items = [{"prompt": prompt_of(a, b), "answer": str(a + b)} for a, b in held_out]
    return {
        "name": "sums-to-20",
        "scorer": "exact",
        "max_tokens": MAX_ANSWER_TOKENS,
        "stop": [STOP],
        "items": items,
    }


def train(
    client: tinker.TrainingClient,
    sums: list[Sum],
    settings: GrpoSettings,
    seed: int,
    after_step: Callable[[GrpoStep], None],
) -> None:
    """GRPO: sample a group per prompt, reward each answer, push towards the better of the group."""
    tokenizer = client.get_tokenizer()
    rng = random.Random(seed)
    for step in range(settings.num_steps):
        # The current weights become a sampler: a copy inside the service, no file to move.
        sampler = client.save_weights_and_get_sampling_client().result()
        chosen = rng.sample(sums, settings.num_prompts)
        prompts = [tokenizer.encode(prompt_of(a, b)) for a, b in chosen]
        pending = [
            sampler.sample(
                prompt=types.ModelInput.from_ints(prompt),
                num_samples=settings.group_size,
                sampling_params=types.SamplingParams(
                    max_tokens=MAX_ANSWER_TOKENS,
                    temperature=1.0,
                    stop=[STOP],
                    seed=seed + 1000 * (step * settings.num_prompts + i),
                ),
            )
            for i, prompt in enumerate(prompts)
        ]
        groups = [future.result().sequences for future in pending]
        data: list[types.Datum] = []
        rewards_PG = np.array(
            [
                [float(is_right(tokenizer.decode(answer.tokens), a + b)) for answer in group]
                for (a, b), group in zip(chosen, groups, strict=True)
            ]
        )
        advantages_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
        for prompt, group, advantages_G in zip(prompts, groups, advantages_PG, strict=True):
            if advantages_G.any():  # all right or all wrong teaches nothing
                data += [_datum(prompt, *pair) for pair in zip(group, advantages_G, strict=True)]
        if data:
            # Both requests are under way at once; the service runs them in this order.
            passed = client.forward_backward(data, "importance_sampling")
            rate = settings.learning_rate * (1 - step / settings.num_steps)
            updated = client.optim_step(types.AdamParams(learning_rate=rate))
            passed.result()
            updated.result()
        after_step(
            GrpoStep(
                number=step + 1,
                reward=float(rewards_PG.mean()),
                num_trained_tokens=sum(datum.model_input.length for datum in data),
                num_sampled_tokens=sum(len(answer.tokens) for group in groups for answer in group),
            )
        )


def _datum(prompt: list[int], answer: types.SampledSequence, advantage: float) -> types.Datum:
    """One sampled answer as a training example; position i predicts token i + 1."""
    assert answer.logprobs is not None
    tokens = [*prompt, *answer.tokens]
    nothing = [0.0] * (len(prompt) - 1)  # prompt positions push nowhere
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "logprobs": np.array([*nothing, *answer.logprobs], np.float32),
        "advantages": np.array([*nothing, *[advantage] * len(answer.tokens)], np.float32),
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={k: types.TensorData.from_numpy(array) for k, array in arrays.items()},
    )
