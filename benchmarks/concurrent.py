"""How much sooner are N GRPO policies done at once than one after another, on the same service?

And do they compute the same? `python -m benchmarks concurrent [--repeats N]`; what a policy does is
in `grpo.py`. Counts of policies are called `count`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import tinker
from tokenizers import Tokenizer

from benchmarks.arms.protocol import versions
from benchmarks.family import Family, MemoryWatch, RunClock
from benchmarks.grpo import (
    PolicyRecord,
    Setting,
    Stall,
    StepRecord,
    Workload,
    grade_by_tests,
    run_policy,
    variety,
)
from benchmarks.house import Line, Patience, Report, Spread, number, table, verdict, wait_for_calm
from benchmarks.machine import busy_seconds, num_cores
from benchmarks.processes import BASES, Stage
from openmint.models.embedded import EMBEDDED_BASE, embedded_base
from tests.servers import TestServer, running_server

COUNTS = (1, 2, 3, 5, 8)
MOST_REPEATS = 2
"""Of the largest count; the others run once."""
LEAST_SPEED_UP, MOST_MEMORY = 1.5, 1.05
INJECTED_SECONDS = 2.0
MEASURED_SETTING = "measured grader time"
SETTINGS = (
    Setting("zero wait", variety),
    Setting(MEASURED_SETTING, grade_by_tests, uses_processes=True),
    Setting(f"injected wait of {INJECTED_SECONDS:g} s a step", variety, False, INJECTED_SECONDS),
)
WARM_UP = Workload(num_steps=1, max_tokens=8, num_evaluated=1, evaluated_tokens=4)
WARM_UP_NUMBER = 99
STATS_SECONDS = 1.5
"""After so long a worker's counters have reached the gateway."""
PACKAGES = ("torch", "transformers", "tinker")
COLUMNS = (
    "policies",
    "makespan, s",
    "speed-up",
    "first end, s",
    "mean end, s",
    "peak memory, GiB",
    "at once, as if alone",
)
TITLE = "Concurrent policies: N GRPO jobs at once against one after another"
JOB = Workload()
MEASURED = (
    "SmolLM2-135M-Instruct, bf16; one `openmint serve` per arm, the unmodified Tinker SDK, one "
    f"client process, a thread per policy. A policy's job, rank {JOB.rank} on all targets: "
    f"{JOB.num_steps} steps, each `save_weights_and_get_sampling_client`, {JOB.num_prompts} "
    f"prompts x {JOB.group_size} samples of exactly {JOB.max_tokens} tokens (no stop), rewards, "
    "importance-sampling `forward_backward` and `optim_step`; then export and greedy evaluation "
    f"({JOB.num_evaluated} prompts x {JOB.evaluated_tokens} tokens). Policy i has the same prompts "
    "and seeds in all arms. Zero wait: the reward is computed at once from the text. Measured "
    "grader time: each sample runs under unittest in a Python process of its own, as many at a "
    f"time as there are cores. Injected wait: zero wait and {INJECTED_SECONDS:g} s of sleep in "
    "each step, a stand-in for slow tools. One after another, the first N of the eight jobs are "
    "the N jobs. All policies stay resident in both arms. Memory: all processes, graders and "
    "client included, sampled four times a second."
)


@dataclass(frozen=True)
class Study:
    """A base, and the jobs that run on it in every setting."""

    question: str
    title: str
    measured: str
    base: str
    """The embedded one's name, or a folder."""
    job: Workload
    settings: Sequence[Setting]
    counts: Sequence[int]

    @property
    def served_as(self) -> str:
        return self.base if self.base == EMBEDDED_BASE else Path(self.base).name

    @property
    def limits(self) -> tuple[str, ...]:
        most = max(self.counts)
        return (
            "Client, graders and service share the cores: waits of one policy are used by another, "
            "but nothing computes beside the engine for free.",
            f"Counts below {most} ran once; the figures of {most} are medians of the repeats.",
            "Seconds in which all processes of a turn were stopped from outside are not counted.",
            "Peak memory with N at once is against one after another up to the end of the N-th.",
        )


STUDY = Study("concurrent", TITLE, MEASURED, EMBEDDED_BASE, JOB, SETTINGS, COUNTS)


@dataclass(frozen=True)
class Turn:
    """One arm's run."""

    policies: tuple[PolicyRecord, ...]
    memory: tuple[tuple[float, int], ...]
    """(seconds since the start, resident bytes of all processes)."""
    train_seconds: float
    serve_seconds: float
    foreign_cpu: float
    """Share of the cores that others used meanwhile."""
    paused_seconds: float = 0.0
    """Time in which all its processes stood still, stopped from outside; no other figure of the
    client's holds it, but the engine's two do."""

    def ends(self, count: int) -> list[float]:
        return [policy.finished_at for policy in self.policies[:count]]

    def peak_bytes(self, count: int) -> int:
        last = max(self.ends(count))
        return max(num_bytes for seconds, num_bytes in self.memory if seconds <= last)


@dataclass(frozen=True)
class Agreement:
    """How far policies computed the same in two arms; gaps are over steps with equal samples and
    rewards."""

    num_policies: int
    num_same_tokens: int
    """Policies whose every sampled and evaluated token is the same."""
    num_graded_otherwise: int
    """Policies that parted because equal samples got other rewards: the grader's doing."""
    loss_gap: float
    grad_norm_gap: float
    logprob_gap: float

    @property
    def is_exact(self) -> bool:
        gaps = (self.loss_gap, self.grad_norm_gap, self.logprob_gap)
        return self.num_same_tokens == self.num_policies and not any(gaps)

    def show(self) -> str:
        if self.is_exact:
            return f"{self.num_policies} of {self.num_policies} to the bit"
        return (
            f"{self.num_same_tokens} of {self.num_policies} the same tokens, "
            f"{self.num_graded_otherwise} graded otherwise; until they part, loss within "
            f"{self.loss_gap:.2g}, log-probability within {self.logprob_gap:.2g}"
        )


@dataclass(frozen=True)
class Comparison:
    """N at once against one after another, once."""

    count: int
    alone: Turn
    at_once: Turn

    @property
    def makespans(self) -> tuple[float, float]:
        return max(self.alone.ends(self.count)), max(self.at_once.ends(self.count))

    @property
    def speed_up(self) -> float:
        alone, at_once = self.makespans
        return alone / at_once

    @property
    def memory_ratio(self) -> float:
        return self.at_once.peak_bytes(self.count) / self.alone.peak_bytes(self.count)

    @property
    def agreement(self) -> Agreement:
        return agreement(self.alone.policies[: self.count], self.at_once.policies)


# -- running --------------------------------------------------------------------------------------


def run_turn(study: Study, setting: Setting, count: int, at_once: bool, patience: Patience) -> Turn:
    """The jobs of `count` policies on a fresh service."""
    with (
        tempfile.TemporaryDirectory() as root,
        running_server(Path(root), bases=(study.base,), bases_from=BASES) as running,
    ):
        server = replace(running, base=study.served_as)
        return turn_on(server, setting, study.job, count, at_once, patience)


def turn_on(
    server: TestServer,
    setting: Setting,
    workload: Workload,
    count: int,
    at_once: bool,
    patience: Patience,
) -> Turn:
    """The jobs of `count` policies on this service, after a small one to warm it up."""
    tokenizer = Tokenizer.from_file(str(embedded_base(BASES) / "tokenizer.json"))
    with (
        tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service,
        ThreadPoolExecutor(num_cores()) as graders,
        ThreadPoolExecutor(count if at_once else 1) as threads,
    ):
        stall = Stall(service, server.base, tokenizer, workload, setting, graders, RunClock())
        run_policy(replace(stall, workload=WARM_UP), WARM_UP_NUMBER)
        wait_for_calm(patience)
        return watched(
            server,
            lambda clock: tuple(
                threads.map(lambda i: run_policy(replace(stall, clock=clock), i), range(count))
            ),
        )


def watched(server: TestServer, work: Callable[[RunClock], tuple[PolicyRecord, ...]]) -> Turn:
    """The turn of a service that does this work."""
    family, engine_before = Family(server.process.pid), engine_seconds(server)
    busy, own, clock = busy_seconds(), family.cpu_seconds(), RunClock()
    with MemoryWatch(family, clock) as memory:
        policies = work(clock)
    seconds = clock.now()
    foreign = (busy_seconds() - busy - clock.paused_busy_seconds) - (family.cpu_seconds() - own)
    time.sleep(STATS_SECONDS)
    train, serve = (
        after - before for after, before in zip(engine_seconds(server), engine_before, strict=True)
    )
    share = max(0.0, foreign) / (seconds * num_cores())
    samples = tuple(memory.samples)
    return Turn(policies, samples, train, serve, share, clock.paused_seconds)


def engine_seconds(server: TestServer) -> tuple[float, float]:
    """Seconds that the engine has trained and sampled so far."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()

    def total(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    return total("openmint_train_seconds_total"), total("openmint_serve_seconds_total")


def compare(study: Study, setting: Setting, repeats: int, patience: Patience) -> list[Comparison]:
    """Each count against the same jobs one after another; the largest count `repeats` times."""
    found, most = [], max(study.counts)
    for repeat in range(repeats):
        alone = run_turn(study, setting, most, False, patience)
        for count in study.counts if repeat == 0 else [most]:
            at_once = run_turn(study, setting, count, True, patience)
            found.append(Comparison(count, alone, at_once))
            print(f"  {setting.name}, {count} policies: {found[-1].speed_up:.2f}x", flush=True)
    return found


# -- judging --------------------------------------------------------------------------------------


def agreement(alone: Sequence[PolicyRecord], at_once: Sequence[PolicyRecord]) -> Agreement:
    pairs = list(zip(alone, at_once, strict=True))
    steps = [pair for one, other in pairs for pair in equal_steps(one, other)]
    return Agreement(
        len(pairs),
        sum(all_tokens(one) == all_tokens(other) for one, other in pairs),
        sum(graded_otherwise(one, other) for one, other in pairs),
        max((abs(one.loss - other.loss) for one, other in steps), default=0.0),
        max((abs(one.grad_norm - other.grad_norm) for one, other in steps), default=0.0),
        max(
            (
                abs(x - y)
                for one, other in steps
                for x, y in zip(one.logprobs_N, other.logprobs_N, strict=True)
            ),
            default=0.0,
        ),
    )


def equal_steps(one: PolicyRecord, other: PolicyRecord) -> list[tuple[StepRecord, StepRecord]]:
    """The steps of two runs of a policy until their samples or rewards part."""
    pairs = zip(one.steps, other.steps, strict=True)
    return list(takewhile(lambda pair: same_work(*pair), pairs))


def same_work(one: StepRecord, other: StepRecord) -> bool:
    return (one.tokens_S, one.reward) == (other.tokens_S, other.reward)


def graded_otherwise(one: PolicyRecord, other: PolicyRecord) -> bool:
    """Whether the first step that differs has the same samples in both runs."""
    pairs = zip(one.steps, other.steps, strict=True)
    parted = next((pair for pair in pairs if not same_work(*pair)), None)
    return parted is not None and parted[0].tokens_S == parted[1].tokens_S


def all_tokens(policy: PolicyRecord) -> list[tuple[tuple[int, ...], ...]]:
    return [*(step.tokens_S for step in policy.steps), policy.evaluated_tokens_S]


# -- reporting ------------------------------------------------------------------------------------


def lines_of(setting: Setting, found: Sequence[Comparison]) -> list[Line]:
    """The figures of the largest count; targets stand on the measured setting."""
    most = [each for each in found if each.count == max(of.count for of in found)]
    work = f"{most[0].count} GRPO policies at once, {setting.name}"
    is_target = setting.name == MEASURED_SETTING
    least, at_most = (LEAST_SPEED_UP, MOST_MEMORY) if is_target else (None, None)
    speed_up = Spread.of([each.speed_up for each in most])
    memory = Spread.of([each.memory_ratio for each in most])
    same = all(each.agreement.is_exact for each in most)
    return [
        Line(
            f"{work}: makespan",
            "" if least is None else f"≥ {least:g}x",
            speed_up.show("x"),
            verdict(speed_up.median, at_least=least),
        ),
        Line(
            f"{work}: peak memory",
            "" if at_most is None else f"≤ {at_most:g}x",
            memory.show("x"),
            verdict(memory.median, at_most=at_most),
        ),
        Line(
            f"{work}: each as if alone",
            "equal",
            "; ".join(dict.fromkeys(each.agreement.show() for each in most)),
            "met" if same else "missed",
        ),
    ]


def text_of(setting: Setting, found: Sequence[Comparison]) -> str:
    """The setting's table, and where the time of the largest count went."""
    rows = [list(COLUMNS)]
    for count in sorted({each.count for each in found}):
        rows.append(row_of([each for each in found if each.count == count]))
    last = found[-1]
    notes = [where_time_went(name, turn) for name, turn in arms_of(last).items()]
    shares = [100 * turn.foreign_cpu for each in found for turn in arms_of(each).values()]
    notes.append(f"Cores used by others in a turn: {max(shares):.0f} % at most.")
    head = f"## {setting.name[0].upper()}{setting.name[1:]}: one after another → at once"
    return "\n\n".join([head, table(rows), "\n".join(f"- {note}" for note in notes)])


def row_of(found: Sequence[Comparison]) -> list[str]:
    """One count's line, one after another → at once: medians of the repeats."""
    count = found[0].count

    def arrow(of: Callable[[Turn], float]) -> str:
        arms = ([of(each.alone) for each in found], [of(each.at_once) for each in found])
        return " → ".join(number(Spread.of(arm).median) for arm in arms)

    speed_up = Spread.of([each.speed_up for each in found])
    return [
        str(count),
        arrow(lambda turn: max(turn.ends(count))),
        speed_up.show("x") if len(found) > 1 else f"{number(speed_up.median)}x",
        arrow(lambda turn: min(turn.ends(count))),
        arrow(lambda turn: sum(turn.ends(count)) / count),
        arrow(lambda turn: turn.peak_bytes(count) / 2**30),
        "; ".join(dict.fromkeys(each.agreement.show() for each in found)),
    ]


def arms_of(comparison: Comparison) -> dict[str, Turn]:
    at_once = f"{comparison.count} at once"
    return {f"{comparison.count} one after another": comparison.alone, at_once: comparison.at_once}


def where_time_went(name: str, turn: Turn) -> str:
    """How long the engine worked, and a step's parts as a policy saw them."""
    steps = [step for policy in turn.policies for step in policy.steps]

    def mean(of: Callable[[StepRecord], float]) -> str:
        return number(sum(map(of, steps)) / len(steps))

    parts = (
        f"a step's rollout took {mean(lambda step: step.rollout_seconds)} s, its wait "
        f"{mean(lambda step: step.wait_seconds)} s, its update "
        f"{mean(lambda step: step.update_seconds)} s."
    )
    if turn.paused_seconds:
        return f"{name} (stopped from outside for {turn.paused_seconds:.0f} s): {parts}"
    whole = max(turn.ends(len(turn.policies)))
    return (
        f"{name}: the engine trained {turn.train_seconds:.0f} s and sampled "
        f"{turn.serve_seconds:.0f} s of {whole:.0f}; {parts}"
    )


def data_of(setting: Setting, found: Sequence[Comparison]) -> dict[str, Any]:
    """Everything but tokens and log-probabilities, which the agreement stands for."""
    comparisons = [
        {
            "policies": each.count,
            "speed_up": each.speed_up,
            "memory_ratio": each.memory_ratio,
            "agreement": asdict(each.agreement),
            "arms": {name: turn_data(turn, each.count) for name, turn in arms_of(each).items()},
        }
        for each in found
    ]
    return {"setting": setting.name, "comparisons": comparisons}


def turn_data(turn: Turn, count: int) -> dict[str, Any]:
    dropped = ("tokens_S", "logprobs_N", "evaluated_tokens_S")
    policies = [asdict(policy) for policy in turn.policies[:count]]
    for policy in policies:
        for record in (policy, *policy["steps"]):
            for key in dropped:
                record.pop(key, None)
    return {
        "policies": policies,
        "peak_bytes": turn.peak_bytes(count),
        "train_seconds": turn.train_seconds,
        "serve_seconds": turn.serve_seconds,
        "foreign_cpu": turn.foreign_cpu,
        "paused_seconds": turn.paused_seconds,
    }


def report_of(study: Study, found: Sequence[tuple[Setting, Sequence[Comparison]]]) -> Report:
    return Report(
        question=study.question,
        title=study.title,
        measured=study.measured,
        tables=[text_of(*each) for each in found],
        lines=[line for each in found for line in lines_of(*each)],
        limits=study.limits,
        data=[data_of(*each) for each in found],
        versions={"service": versions(PACKAGES)},
    )


def answer(study: Study, stage: Stage, repeats: int) -> Report:
    """`stage` only says how patient to be: the services bring their own processes."""
    repeats = min(repeats, MOST_REPEATS)
    found = [
        (setting, compare(study, setting, repeats, stage.patience)) for setting in study.settings
    ]
    return report_of(study, found)


def ask(stage: Stage, repeats: int) -> Report:
    return answer(STUDY, stage, repeats)
