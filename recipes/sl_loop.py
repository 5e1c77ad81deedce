"""Supervised fine-tuning in one flat loop, with nothing but the public `tinker` SDK.

The model learns to read numbers: "four hundred two =" -> " 402". Needs TINKER_BASE_URL,
TINKER_API_KEY and the tokenizer (`openmint tokenizer install`, HF_HUB_OFFLINE=1).
Run: python recipes/sl_loop.py [--steps 40]
"""

from __future__ import annotations

import argparse
import random

import numpy as np
import tinker
from tinker import types

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH_SIZE = 32
LEARNING_RATE = 5e-4
NUM_HELD_OUT = 50

TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
ONES = f"zero one two three four five six seven eight nine {TEENS}".split()
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    rest = f" {in_words(number % 100)}" if number % 100 else ""
    return f"{ONES[number // 100]} hundred{rest}"


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
steps = parser.parse_args().steps

rng = random.Random(0)
numbers = list(range(1000))
rng.shuffle(numbers)
held_out, training = numbers[:NUM_HELD_OUT], numbers[NUM_HELD_OUT:]

service = tinker.ServiceClient()
client = service.create_lora_training_client(
    base_model=BASE, rank=8, seed=0, train_unembed=False, user_metadata={"policy": "read-numbers"}
).result()
tokenizer = client.get_tokenizer()

for step in range(steps):
    data = []
    for number in rng.sample(training, BATCH_SIZE):
        prompt = tokenizer.encode(f"{in_words(number)} =")
        answer = tokenizer.encode(f" {number}\n")
        tokens = prompt + answer
        # Position i predicts token i + 1; only the answer has weight.
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:])),
                    "weights": types.TensorData.from_numpy(np.array(weights, np.float32)),
                },
            )
        )
    # Ask for both before waiting for either: the service runs them in order, back to back.
    passed = client.forward_backward(data, "cross_entropy")
    updated = client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE * (1 - step / steps)))
    loss = passed.result().metrics["loss:sum"] / BATCH_SIZE
    updated.result()
    print(f"step {step + 1}/{steps}  loss per answer {loss:.3f}")

sampler = client.save_weights_and_get_sampling_client().result()
greedy = types.SamplingParams(max_tokens=6, temperature=0.0, stop=["\n"])
pending = [
    sampler.sample(
        prompt=types.ModelInput.from_ints(tokenizer.encode(f"{in_words(number)} =")),
        num_samples=1,
        sampling_params=greedy,
    )
    for number in held_out
]
texts = [tokenizer.decode(future.result().sequences[0].tokens).strip() for future in pending]
num_right = sum(text == str(number) for text, number in zip(texts, held_out, strict=True))
print(f"held out: {num_right}/{NUM_HELD_OUT} right")
print("saved as", client.save_weights_for_sampler("final").result().path)
