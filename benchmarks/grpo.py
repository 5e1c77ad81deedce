"""What does one policy of the question "concurrent" do? A small GRPO job on code, then its export
and evaluation, through the unmodified Tinker SDK.

Everything random is seeded by the policy's number and no token ends a sample, so that a policy does
the same work whoever else is there. Suffixes: P prompts, G samples of a group.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tinker
from tinker import types
from tokenizers import Tokenizer

from benchmarks.family import RunClock

EXAMPLE = 'def double(x):\n    """Twice x."""\n    return 2 * x\n\n\n'
GRADER_SECONDS = 10.0
"""A program that takes longer is wrong."""


@dataclass(frozen=True)
class Task:
    """A function to write, and what its calls must give."""

    head: str
    about: str
    calls: tuple[tuple[str, str], ...]

    @property
    def function(self) -> str:
        return f'def {self.head}:\n    """{self.about}"""\n    return'

    @property
    def prompt(self) -> str:
        return EXAMPLE + self.function


TASKS = (
    Task("add(a, b)", "The sum of a and b.", (("add(2, 3)", "5"), ("add(-1, 1)", "0"))),
    Task("square(x)", "x times x.", (("square(3)", "9"), ("square(-2)", "4"))),
    Task("negative(x)", "x with the other sign.", (("negative(3)", "-3"), ("negative(-2)", "2"))),
    Task("is_even(n)", "Whether n is even.", (("is_even(4)", "True"), ("is_even(7)", "False"))),
    Task("smaller(a, b)", "The smaller one.", (("smaller(4, 2)", "2"), ("smaller(1, 9)", "1"))),
    Task("first(values)", "The first value.", (("first([4, 2])", "4"), ("first('xy')", "'x'"))),
    Task("last(values)", "The last value.", (("last([4, 2])", "2"), ("last('xy')", "'y'"))),
    Task("largest(values)", "The largest value.", (("largest([1, 5, 2])", "5"),)),
    Task("total(values)", "The sum of the values.", (("total([1, 5])", "6"), ("total([])", "0"))),
    Task("backwards(text)", "The text, last letter first.", (("backwards('abc')", "'cba'"),)),
    Task("join(words)", "The words, spaces between.", (("join(['a', 'b'])", "'a b'"),)),
    Task("shout(text)", "The text in capitals.", (("shout('hey')", "'HEY'"),)),
)


@dataclass(frozen=True)
class Workload:
    """How much each policy does."""

    num_steps: int = 3
    num_prompts: int = 2
    group_size: int = 4
    max_tokens: int = 48
    num_evaluated: int = 4
    evaluated_tokens: int = 24
    rank: int = 8
    learning_rate: float = 3e-4


Grade = Callable[[Task, str], float]
"""The reward of a completion."""


@dataclass(frozen=True)
class Setting:
    """How rewards come about, and how long a client waits for them."""

    name: str
    grade: Grade
    uses_processes: bool = False
    injected_seconds: float = 0.0
    """Slept in each step after its samples are there, in place of a real wait."""


@dataclass(frozen=True)
class StepRecord:
    """One update. What it computed, to compare arms by; how long its parts took."""

    tokens_S: tuple[tuple[int, ...], ...]
    """Each sample's tokens."""
    logprobs_N: tuple[float, ...]
    """The trainer's log-probabilities of all sampled tokens, before the update."""
    loss: float
    grad_norm: float
    reward: float
    rollout_seconds: float
    wait_seconds: float
    update_seconds: float


@dataclass(frozen=True)
class PolicyRecord:
    """One policy's whole job; times count from the start of its arm."""

    number: int
    started_at: float
    finished_at: float
    steps: tuple[StepRecord, ...]
    evaluated_tokens_S: tuple[tuple[int, ...], ...]
    evaluated_reward: float
    export_seconds: float
    evaluation_seconds: float


# -- rewards --------------------------------------------------------------------------------------


def variety(_: Task, completion: str) -> float:
    """Share of the words that differ: costs nothing, and hardly ever the same within a group."""
    words = completion.split()
    return len(set(words)) / max(1, len(words))


def grade_by_tests(task: Task, completion: str) -> float:
    """Share of the task's calls that give what they must, and a tenth of `variety`.

    The function runs under unittest in a Python process of its own, without files or network of
    this one's.
    """
    command = [sys.executable, "-I", "-c", program(task, completion)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GRADER_SECONDS,
        )
        num_passed = int(done.stdout.split()[-1]) if done.returncode == 0 else 0
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        num_passed = 0
    return num_passed / len(task.calls) + 0.1 * variety(task, completion)


def program(task: Task, completion: str) -> str:
    """The function as sampled, its tests, and a last line that says how many passed."""
    tests = "".join(
        f"    def test_{i}(self):\n        self.assertEqual({call}, {wanted})\n"
        for i, (call, wanted) in enumerate(task.calls)
    )
    return (
        "import resource, unittest\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (2, 2))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"{task.function}{body_of(completion)}\n\n"
        f"class Test(unittest.TestCase):\n{tests}\n"
        "result = unittest.TestResult()\n"
        "unittest.defaultTestLoader.loadTestsFromTestCase(Test).run(result)\n"
        "print(result.testsRun - len(result.failures) - len(result.errors))\n"
    )


def body_of(completion: str) -> str:
    """The rest of the function's last line, and what follows as far as it is indented and whole."""
    first, *others = completion.split("\n")
    body = itertools.takewhile(lambda line: not line or line.startswith(" "), others[:-1])
    return "\n".join([first, *body])


# -- the job --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stall:
    """What the policies of an arm have in common."""

    service: tinker.ServiceClient
    base: str
    tokenizer: Tokenizer
    workload: Workload
    setting: Setting
    graders: ThreadPoolExecutor
    """As many graders as cores, for whoever has samples to grade."""
    clock: RunClock

    def encode(self, task: Task) -> list[int]:
        ids: list[int] = self.tokenizer.encode(task.prompt).ids
        return ids

    def rewards(self, task: Task, samples: Sequence[types.SampledSequence]) -> list[float]:
        texts = [self.tokenizer.decode(list(sample.tokens)) for sample in samples]
        if not self.setting.uses_processes:
            return [self.setting.grade(task, text) for text in texts]
        return list(self.graders.map(lambda text: self.setting.grade(task, text), texts))


def run_policy(stall: Stall, number: int) -> PolicyRecord:
    """Train, export, evaluate: the whole life of policy `number` in its arm."""
    started_at = stall.clock.now()
    load, rng = stall.workload, random.Random(number)
    trainer = stall.service.create_lora_training_client(
        stall.base, rank=load.rank, seed=number
    ).result()
    steps = []
    for step in range(load.num_steps):
        tasks = rng.sample(TASKS, load.num_prompts)
        steps.append(one_step(stall, trainer, tasks, seed=100_000 * number + 1000 * step))
    export_started_at = stall.clock.now()
    path = trainer.save_weights_for_sampler("final").result().path
    exported_at = stall.clock.now()
    evaluated, reward = evaluate(stall, path, rng.sample(TASKS, load.num_evaluated))
    finished_at = stall.clock.now()
    return PolicyRecord(
        number,
        started_at,
        finished_at,
        tuple(steps),
        evaluated,
        reward,
        exported_at - export_started_at,
        finished_at - exported_at,
    )


def one_step(
    stall: Stall, trainer: tinker.TrainingClient, tasks: Sequence[Task], seed: int
) -> StepRecord:
    """Roll out, grade, update."""
    load, started_at = stall.workload, stall.clock.now()
    sampler = trainer.save_weights_and_get_sampling_client().result()
    prompts = [stall.encode(task) for task in tasks]
    pending = [
        sampler.sample(
            prompt=types.ModelInput.from_ints(prompt),
            num_samples=load.group_size,
            # No stop at all: every sample has as many tokens as every other.
            sampling_params=types.SamplingParams(
                max_tokens=load.max_tokens, temperature=1.0, seed=seed + 100 * i, stop=[]
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    groups = [future.result().sequences for future in pending]
    rolled_out_at = stall.clock.now()
    rewards_PG = np.array([stall.rewards(*pair) for pair in zip(tasks, groups, strict=True)])
    time.sleep(stall.setting.injected_seconds)
    graded_at = stall.clock.now()
    advantages_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    data = [
        datum(prompt, sample, advantage)
        for prompt, group, advantages_G in zip(prompts, groups, advantages_PG, strict=True)
        for sample, advantage in zip(group, advantages_G, strict=True)
    ]
    passing = trainer.forward_backward(data, "importance_sampling")
    updating = trainer.optim_step(types.AdamParams(learning_rate=load.learning_rate))
    passed, updated = passing.result(), updating.result()
    return StepRecord(
        tokens_S=tuple(tuple(sample.tokens) for group in groups for sample in group),
        logprobs_N=sampled_logprobs(passed, load.max_tokens),
        loss=float(passed.metrics["loss:sum"]),
        grad_norm=float((updated.metrics or {})["grad_norm:max"]),
        reward=float(rewards_PG.mean()),
        rollout_seconds=rolled_out_at - started_at,
        wait_seconds=graded_at - rolled_out_at,
        update_seconds=stall.clock.now() - graded_at,
    )


def datum(prompt: list[int], sample: types.SampledSequence, advantage: float) -> types.Datum:
    """One sample as a training example; position i predicts token i + 1."""
    assert sample.logprobs is not None
    tokens = [*prompt, *sample.tokens]
    silent = [0.0] * (len(prompt) - 1)
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "logprobs": np.array([*silent, *sample.logprobs], np.float32),
        "advantages": np.array([*silent, *[advantage] * len(sample.tokens)], np.float32),
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={k: types.TensorData.from_numpy(array) for k, array in arrays.items()},
    )


def sampled_logprobs(passed: types.ForwardBackwardOutput, max_tokens: int) -> tuple[float, ...]:
    """The trainer's log-probabilities of the sampled tokens, sample by sample."""
    outputs = [output["logprobs"].data for output in passed.loss_fn_outputs]
    return tuple(float(x) for logprobs in outputs for x in logprobs[-max_tokens:])


def evaluate(
    stall: Stall, path: str, tasks: Sequence[Task]
) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Greedy answers of the exported revision, and their mean reward."""
    sampler = stall.service.create_sampling_client(model_path=path).result()
    greedy = types.SamplingParams(
        max_tokens=stall.workload.evaluated_tokens, temperature=0.0, stop=[]
    )
    pending = [
        sampler.sample(types.ModelInput.from_ints(stall.encode(task)), 1, greedy) for task in tasks
    ]
    answers = [future.result().sequences for future in pending]
    rewards = [stall.rewards(*pair) for pair in zip(tasks, answers, strict=True)]
    return tuple(tuple(answer[0].tokens) for answer in answers), float(np.mean(rewards))
