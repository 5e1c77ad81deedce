"""Reinforcement learning (GRPO) in one flat loop, with nothing but the public `tinker` SDK.

The model learns to name the larger of two numbers; all it is ever told is whether it was right.
Needs TINKER_BASE_URL, TINKER_API_KEY and the tokenizer (`openmint tokenizer install`,
HF_HUB_OFFLINE=1). Run: python recipes/rl_loop.py [--steps 20]
"""

from __future__ import annotations

import argparse
import random

import numpy as np
import tinker
from tinker import types

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_PROMPTS = 12
GROUP_SIZE = 8
LEARNING_RATE = 3e-4
MAX_TOKENS = 5

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
steps = parser.parse_args().steps

rng = random.Random(0)
service = tinker.ServiceClient()
client = service.create_lora_training_client(
    base_model=BASE, rank=8, seed=0, train_unembed=False, user_metadata={"policy": "larger-number"}
).result()
tokenizer = client.get_tokenizer()

for step in range(steps):
    # 1. The current weights become a sampler; nothing is downloaded.
    sampler = client.save_weights_and_get_sampling_client().result()

    # 2. Roll out: a group of answers to each prompt, all under way at once.
    pairs = [tuple(rng.sample(range(10, 100), 2)) for _ in range(NUM_PROMPTS)]
    prompts = [
        tokenizer.encode(f"larger of 31 and 18: 31\nlarger of {a} and {b}:") for a, b in pairs
    ]
    pending = [
        sampler.sample(
            prompt=types.ModelInput.from_ints(prompt),
            num_samples=GROUP_SIZE,
            sampling_params=types.SamplingParams(
                max_tokens=MAX_TOKENS, stop=["\n"], seed=1000 * (step * NUM_PROMPTS + i)
            ),
        )
        for i, prompt in enumerate(prompts)
    ]

    # 3. Reward, and advantage within the group; then one example per answer.
    data, rewards = [], []
    for (a, b), prompt, future in zip(pairs, prompts, pending, strict=True):
        group = future.result().sequences
        rewards_G = [float(tokenizer.decode(s.tokens).strip() == str(max(a, b))) for s in group]
        rewards += rewards_G
        mean = sum(rewards_G) / GROUP_SIZE
        if mean in (0.0, 1.0):
            continue  # all alike: no direction to learn
        for sampled, reward in zip(group, rewards_G, strict=True):
            tokens = [*prompt, *sampled.tokens]
            nothing = [0.0] * (len(prompt) - 1)
            arrays = {
                "target_tokens": np.array(tokens[1:]),
                "logprobs": np.array([*nothing, *sampled.logprobs], np.float32),
                "advantages": np.array(
                    [*nothing, *[reward - mean] * len(sampled.tokens)], np.float32
                ),
            }
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        k: types.TensorData.from_numpy(array) for k, array in arrays.items()
                    },
                )
            )

    # 4. Update.
    if data:
        passed = client.forward_backward(data, "importance_sampling")
        rate = LEARNING_RATE * (1 - step / steps)
        client.optim_step(types.AdamParams(learning_rate=rate)).result()
        passed.result()
    print(f"step {step + 1}/{steps}  reward {sum(rewards) / len(rewards):.3f}")

print("saved as", client.save_weights_for_sampler("final").result().path)
