"""globex's policy: which language is this phrase in? Learned by SFT from real data.

The phrases are names of countries, languages and currencies in eight languages, from the Unicode
CLDR tables inside the `babel` package. Held out are whole entries (say, the Swiss franc in every
language), so the score is about language, not about remembered names.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tinker
from babel import Locale
from tinker import types

LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "nl": "Dutch",
    "pl": "Polish",
    "fi": "Finnish",
}
TABLES = ("territories", "languages", "currencies")
STOP = "\n"
MAX_ANSWER_TOKENS = 4
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Phrase:
    """`entry` names the CLDR entry, the same in every language."""

    entry: str
    text: str
    language: str


@dataclass(frozen=True)
class SftSettings:
    num_steps: int
    batch_size: int = 64
    learning_rate: float = 5e-4
    rank: int = 16


@dataclass(frozen=True)
class SftStep:
    """`loss` is nats per answer before the update."""

    number: int
    loss: float
    num_trained_tokens: int


def read_phrases() -> list[Phrase]:
    """Every phrase that belongs to exactly one of the eight languages, once."""
    found: dict[str, list[Phrase]] = defaultdict(list)
    for code, language in LANGUAGES.items():
        for table in TABLES:
            for key, text in getattr(Locale(code), table).items():
                if text != key:
                    found[text.casefold()].append(Phrase(f"{table}/{key}", text, language))
    return [
        phrases[0]
        for _, phrases in sorted(found.items())
        if len({phrase.language for phrase in phrases}) == 1
    ]


def split_phrases(
    phrases: list[Phrase], num_held_out: int, seed: int
) -> tuple[list[Phrase], list[Phrase]]:
    """(training phrases, held-out phrases) that share no entry."""
    rng = random.Random(seed)
    entries = sorted({phrase.entry for phrase in phrases})
    rng.shuffle(entries)
    held_entries = set(entries[: num_held_out // 2])  # about six phrases an entry: enough to draw
    training = [phrase for phrase in phrases if phrase.entry not in held_entries]
    held_out = [phrase for phrase in phrases if phrase.entry in held_entries]
    rng.shuffle(training)
    return training, rng.sample(held_out, num_held_out)


def prompt_of(text: str) -> str:
    return f"{text}\nLanguage:"


def evaluation_task(held_out: list[Phrase]) -> dict[str, object]:
    """The task that the service scores: greedy, exact answer."""
    items = [{"prompt": prompt_of(phrase.text), "answer": phrase.language} for phrase in held_out]
    return {
        "name": "language-of-phrase",
        "scorer": "exact",
        "max_tokens": MAX_ANSWER_TOKENS,
        "stop": [STOP],
        "items": items,
    }


def train(
    client: tinker.TrainingClient,
    phrases: list[Phrase],
    settings: SftSettings,
    after_step: Callable[[SftStep], None],
) -> None:
    """Supervised fine-tuning: raise the log-probability of the right answer, batch by batch."""
    tokenizer = client.get_tokenizer()
    for step in range(settings.num_steps):
        start = step * settings.batch_size
        batch = phrases[start : start + settings.batch_size]
        data = [
            _datum(
                tokenizer.encode(prompt_of(phrase.text)),
                tokenizer.encode(f" {phrase.language}{STOP}"),
            )
            for phrase in batch
        ]
        passed = client.forward_backward(data, "cross_entropy")
        rate = settings.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS)
        rate *= 1 - step / settings.num_steps
        updated = client.optim_step(types.AdamParams(learning_rate=rate))
        loss = passed.result().metrics["loss:sum"] / len(batch)
        updated.result()
        num_tokens = sum(datum.model_input.length for datum in data)
        after_step(SftStep(step + 1, loss, num_tokens))


def _datum(prompt: list[int], answer: list[int]) -> types.Datum:
    """Weight 1 on the answer, 0 on the prompt; position i predicts token i + 1."""
    tokens = [*prompt, *answer]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:], np.int64)),
            "weights": types.TensorData.from_numpy(np.array(weights, np.float32)),
        },
    )
