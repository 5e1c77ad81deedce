"""The main job of OpenMinT, end to end: `python -m examples.demo [--quick]`.

Two tenants train on one resident base at the same time, with the plain `tinker` SDK; their
revisions are evaluated, promoted, asked through the plain `openai` SDK, replaced by a worse one
and rolled back. Exits 1 as soon as something that it says isn't so. Read `Story.tell` first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Before a Hugging Face library is imported: the tokenizer lies in a local folder.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TINKER_TELEMETRY"] = "0"

import openai
import tinker
from rich.console import Console

from examples.demo import arithmetic, languages
from examples.demo.arithmetic import GrpoSettings, GrpoStep
from examples.demo.catalogue import Catalogue, Score
from examples.demo.languages import SftSettings, SftStep
from examples.demo.progress import Board, Curve
from examples.demo.report import ClaimFailed, Report, draw_curves
from examples.demo.service import MemoryWatch, Service, running_service

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SUMS, PHRASES = "acme/arithmetic", "globex/languages"
EARLY, FINAL = "early", "final"
SEED = 7
MEMORY_LIMIT_BYTES = 3_000_000_000
LARGEST_REVISION = 0.05
"""Of the base's bytes."""
PROMOTE, REPLACE = "promote and ask", "replace and roll back"


@dataclass(frozen=True)
class Scale:
    """How much is trained and asked, and by how many points the scores must rise."""

    grpo: GrpoSettings
    sft: SftSettings
    grpo_early_step: int
    sft_early_step: int
    num_held_out: int
    grpo_rise: float
    sft_rise: float


FULL = Scale(
    grpo=GrpoSettings(num_steps=24),
    sft=SftSettings(num_steps=60),
    grpo_early_step=1,
    sft_early_step=4,
    num_held_out=150,
    grpo_rise=15,
    sft_rise=30,
)
QUICK = Scale(
    grpo=GrpoSettings(num_steps=8, num_prompts=12),
    sft=SftSettings(num_steps=20, batch_size=48),
    grpo_early_step=1,
    sft_early_step=3,
    num_held_out=100,
    grpo_rise=5,
    sft_rise=15,
)


class Story:
    """The demo's steps on one running service."""

    def __init__(self, scale: Scale, service: Service, report: Report, output: Path) -> None:
        self.scale, self.service, self.report, self.output = scale, service, report, output
        self.console = report.console
        self.acme_key, self.globex_key = service.create_key("acme"), service.create_key("globex")
        self.acme = Catalogue(service.url, self.acme_key)
        self.globex = Catalogue(service.url, self.globex_key)
        self.sums, held_sums = arithmetic.split_sums(scale.num_held_out, SEED)
        self.phrases, held_phrases = languages.split_phrases(
            languages.read_phrases(), scale.num_held_out, SEED
        )
        self.sums_task = arithmetic.evaluation_task(held_sums)
        self.phrases_task = languages.evaluation_task(held_phrases)
        self.curves = [
            Curve(SUMS, "GRPO", "reward", scale.grpo.num_steps),
            Curve(PHRASES, "SFT", "loss", scale.sft.num_steps),
        ]

        self.saved: dict[tuple[str, str], str] = {}
        """`tinker://` path by policy and name; each names one immutable revision."""

    def tell(self) -> None:
        """Train, evaluate, promote, ask, replace, roll back."""
        with self.stage("evaluate the base"):
            sums_before, phrases_before = self.evaluate(BASE, BASE)
        with self.stage(f"train both ({self.scale.grpo.num_steps} handovers, 4 exports)"):
            self.train()
        with self.stage("evaluate four revisions"):
            _, phrases_early = self.evaluate(self.saved[SUMS, EARLY], self.saved[PHRASES, EARLY])
            sums_after, phrases_after = self.evaluate(
                self.saved[SUMS, FINAL], self.saved[PHRASES, FINAL]
            )
        self.check_rise(SUMS, sums_before, sums_after, self.scale.grpo_rise)
        self.check_rise(PHRASES, phrases_before, phrases_after, self.scale.sft_rise)
        with self.stage(PROMOTE):
            self.promote_and_ask(sums_after, phrases_after)
        with self.stage(REPLACE):
            self.replace_and_roll_back(phrases_early, phrases_after)
        with self.stage("count bytes"):
            self.check_bytes()

    def train(self) -> None:
        """Both tenants at once, each with a client of its own, in two threads."""
        with Board(self.console, self.curves) as board, ThreadPoolExecutor(2) as threads:
            jobs = [
                threads.submit(self.train_acme, board),
                threads.submit(self.train_globex, board),
            ]
            for job in jobs:
                job.result()

    def train_acme(self, board: Board) -> None:
        client = self.training_client(self.acme_key, SUMS, self.scale.grpo.rank)

        def after_step(step: GrpoStep) -> None:
            tokens = step.num_trained_tokens, step.num_sampled_tokens
            board.add(self.curves[0], step.reward, *tokens)
            if step.number == self.scale.grpo_early_step:
                self.export(client, SUMS, EARLY)

        arithmetic.train(client, self.sums, self.scale.grpo, SEED, after_step)
        self.export(client, SUMS, FINAL)

    def train_globex(self, board: Board) -> None:
        client = self.training_client(self.globex_key, PHRASES, self.scale.sft.rank)

        def after_step(step: SftStep) -> None:
            board.add(self.curves[1], step.loss, step.num_trained_tokens)
            if step.number == self.scale.sft_early_step:
                self.export(client, PHRASES, EARLY)

        languages.train(client, self.phrases, self.scale.sft, after_step)
        self.export(client, PHRASES, FINAL)

    def training_client(self, key: str, policy: str, rank: int) -> tinker.TrainingClient:
        """A new training run of `policy`, with the SDK as it is."""
        service = tinker.ServiceClient(base_url=self.service.url, api_key=key)
        return service.create_lora_training_client(
            base_model=BASE,
            rank=rank,
            seed=SEED,
            train_unembed=False,
            user_metadata={"policy": policy.partition("/")[2]},
        ).result()

    def export(self, client: tinker.TrainingClient, policy: str, name: str) -> None:
        """Make the weights of now a revision of the policy."""
        self.saved[policy, name] = client.save_weights_for_sampler(name).result().path

    def evaluate(self, sums_model: str, phrases_model: str) -> tuple[Score, Score]:
        """Held-out scores of both tasks; the service draws and scores, and keeps the results."""
        sums = self.acme.evaluate(sums_model, self.sums_task)
        self.console.print(f"  {_shown(sums_model):<42} sums      {sums}", highlight=False)
        phrases = self.globex.evaluate(phrases_model, self.phrases_task)
        self.console.print(f"  {_shown(phrases_model):<42} languages {phrases}", highlight=False)
        return sums, phrases

    def check_rise(self, policy: str, before: Score, after: Score, wanted: float) -> None:
        self.report.scores.append((policy, before, after, wanted))
        rise = after.percent - before.percent
        self.report.claim(
            rise >= wanted,
            f"{policy} answers {rise:+.1f} points better on {after.num_items} held-out items "
            f"(at least {wanted:.0f} wanted)",
        )

    def promote_and_ask(self, sums_after: Score, phrases_after: Score) -> None:
        """acme promotes over REST, globex on the command line; both are then asked by alias."""
        self.acme.promote(SUMS, str(sums_after.revision), "better on held-out sums")
        self.service.cli(
            "promote", f"{PHRASES}@{phrases_after.revision}", "--yes", key=self.globex_key
        )
        answer = self.ask(self.acme_key, f"{SUMS}@prod", arithmetic.prompt_of(8, 9))
        self.check_ran(f"{SUMS}@prod", answer, str(sums_after.revision))
        answer = self.ask(self.globex_key, f"{PHRASES}@prod", languages.prompt_of("Schweizer Käse"))
        self.check_ran(f"{PHRASES}@prod", answer, str(phrases_after.revision))

    def replace_and_roll_back(self, worse: Score, better: Score) -> None:
        """A mistake and its repair: each takes effect for the next request."""
        self.report.claim(
            worse.percent < better.percent and worse.revision != better.revision,
            f"the revision after {self.scale.sft_early_step} updates is worse than the last "
            f"({worse.percent:.1f} % < {better.percent:.1f} %)",
        )
        prompt, model = languages.prompt_of("Schweizer Käse"), f"{PHRASES}@prod"
        self.globex.promote(PHRASES, str(worse.revision), "by mistake")
        self.check_ran(model, self.ask(self.globex_key, model, prompt), str(worse.revision))
        self.globex.roll_back(PHRASES, "worse on held-out phrases")
        self.check_ran(model, self.ask(self.globex_key, model, prompt), str(better.revision))

    def check_bytes(self) -> None:
        """A revision is a small part of the base; an alias that moves, moves no weights."""
        base_bytes = self.acme.base_weight_bytes()
        for catalogue, policy in ((self.acme, SUMS), (self.globex, PHRASES)):
            size = int(catalogue.revision(policy, "prod")["size_bytes"])
            self.report.claim(
                size <= LARGEST_REVISION * base_bytes,
                f"a revision of {policy} has {size:,} bytes, {size / base_bytes:.1%} of the base",
            )
        moved = [size for name, _, size in self.report.stages if name in (PROMOTE, REPLACE)]
        self.report.claim(moved == [0, 0], "promoting and rolling back moved no adapter at all")

    def ask(self, key: str, model: str, prompt: str) -> tuple[str, str]:
        """(text, digest of the revision that ran), from the OpenAI SDK as it is."""
        client = openai.OpenAI(base_url=f"{self.service.url}/v1", api_key=key)
        answer = client.completions.with_raw_response.create(
            model=model, prompt=prompt, max_tokens=5, temperature=0, stop="\n"
        )
        ran = answer.headers["X-OpenMint-Revision"]
        return answer.parse().choices[0].text.strip(), ran

    def check_ran(self, model: str, answer: tuple[str, str], expected: str) -> None:
        text, ran = answer
        self.report.claim(ran == expected, f"{model} answers “{text}”, from {ran[:19]}…")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A heading, and a line of the last table: seconds and bytes added to the store."""
        self.console.rule(f"[bold]{name}", align="left")
        started_at, stored_bytes = time.monotonic(), self.service.stored_bytes()
        yield
        moved_bytes = self.service.stored_bytes() - stored_bytes
        self.report.stages.append((name, time.monotonic() - started_at, moved_bytes))


def _shown(model: str) -> str:
    """A base as it is; of a `tinker://` path, whose run id is long, only the name."""
    return f"revision “{model.rpartition('/')[2]}”" if model.startswith("tinker://") else model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller: under 3 minutes")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="result folder")
    arguments = parser.parse_args(argv)
    # Where the output isn't a terminal, 80 columns would break the tables.
    console = Console(width=None if sys.stdout.isatty() else 100)
    try:
        run(QUICK if arguments.quick else FULL, arguments.output.resolve(), console)
    except ClaimFailed as failed:
        console.print(f"  [red]✗ not so:[/red] {failed}", highlight=False, soft_wrap=True)
        return 1
    return 0


def run(scale: Scale, output: Path, console: Console) -> None:
    """The whole demo. Raises ClaimFailed, or whatever broke."""
    started_at = time.monotonic()
    data, log = fresh_data_folder(output), output / "service.log"
    console.rule("[bold]start the service", align="left")
    report = Report(console)
    with MemoryWatch() as memory, running_service(data, log) as service:
        ready_seconds = time.monotonic() - started_at
        report.stages.append(("start the service", ready_seconds, 0))
        console.print(f"  {service.url} is ready with {BASE} after {ready_seconds:.1f} s")
        with working_folder(data / "client"):  # where the SDK finds the tokenizer by name
            story = Story(scale, service, report, output)
            story.tell()
        base_bytes = story.acme.base_weight_bytes()
    report.print_tables(base_bytes)
    report.claim(
        memory.peak_bytes <= MEMORY_LIMIT_BYTES,
        "service, worker and client together never held more than 3 GB of memory "
        f"({memory.peak_bytes / 1e9:.2f} GB)",
    )
    curves = output / "learning_curves.png"
    draw_curves(story.curves, report.scores, curves)
    say_goodbye(console, output, data, curves, time.monotonic() - started_at)


def fresh_data_folder(output: Path) -> Path:
    """An empty data folder, but for the converted base of an earlier demo."""
    data = output / "data"
    for path in data.glob("*"):
        if path.name != "bases":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    data.mkdir(parents=True, exist_ok=True)
    return data


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def say_goodbye(console: Console, output: Path, data: Path, curves: Path, seconds: float) -> None:
    console.print(f"\nDone in {seconds:.0f} s. Learning curves: {curves}", soft_wrap=True)
    console.print(
        f"""
Keep serving what was trained:
  openmint serve --data {data}
  openmint revisions list acme/arithmetic --data {data}
  openmint aliases history globex/languages --data {data}
Read next: examples/demo/arithmetic.py (GRPO), examples/demo/languages.py (SFT), recipes/, docs/""",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
