import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from openmint.errors import EngineFailed, Overloaded
from openmint.scheduler.work import SampleDelta, SampleResult, SampleWork
from openmint.service.completions import Answer, Completions
from openmint.service.targets import Target
from openmint.service.tokenizers import TokenizerCache
from openmint.types import BaseInfo, Digest, SampledSequence, Tenant
from openmint.wire.openai import Choice, InvalidField, Usage, parse_chat, parse_completion

ACME = Tenant("acme")
BASE = Digest("sha256:" + "ba" * 32)
REVISION = Digest("sha256:" + "ab" * 32)
EOS = 1
CONTEXT = 200

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class ScriptedWorker:
    """Answers every sample with `text` and the end token, byte by byte, as a real one would."""

    base: BaseInfo
    encode: Callable[[str], list[int]]
    text: str = "Hello wörld"
    revision: Digest | None = REVISION
    error: Exception | None = None
    delay_seconds: float = 0.0
    works: list[SampleWork] = field(default_factory=list)
    num_cancelled: int = 0
    epoch: int = 3

    async def call(self, work: SampleWork) -> SampleResult:
        self.works.append(work)
        try:
            await asyncio.sleep(self.delay_seconds)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error:
            raise self.error
        tokens = [*self.encode(self.text), EOS]
        sequence = SampledSequence(
            np.array(tokens), np.full(len(tokens), -0.5, dtype=np.float32), "stop"
        )
        return SampleResult((sequence,) * work.num_samples, self.revision, BASE)

    async def stream(self, work: SampleWork) -> AsyncIterator[SampleDelta | SampleResult]:
        result = await self.call(work)
        for step in range(len(result.sequences[0].tokens_N)):
            for i, sequence in enumerate(result.sequences):
                token = int(sequence.tokens_N[step])
                yield SampleDelta(i, (token,), (-0.5,))
            try:
                await asyncio.sleep(self.delay_seconds)
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        yield result


@dataclass
class OneTarget:
    target: Target
    keys: list[str] = field(default_factory=list)

    def resolve(self, tenant: Tenant, model: str, split_key: str) -> Target:
        self.keys.append(split_key)
        return self.target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def worker(folder: Path) -> ScriptedWorker:
    base = BaseInfo(
        name="tiny",
        digest=BASE,
        architecture="LlamaForCausalLM",
        directory=str(folder),
        dtype="float32",
        device="cpu",
        vocab_size=258,
        context_length=CONTEXT,
        eos_token_ids=(EOS,),
        num_params=1,
        weight_bytes=4,
        max_rank=8,
        stacks=(),
    )
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ScriptedWorker(base, lambda text: list(loaded.encode(text).ids))


class Counted:
    """Remembers which answers were counted as failed."""

    def __init__(self) -> None:
        self.failed: list[bool] = []

    def note_answer(self, tenant: Tenant, policy: str, digest: Digest, *, failed: bool) -> None:
        assert (tenant, policy, digest) == (ACME, "support", REVISION)
        self.failed.append(failed)


class NoLimits:
    """Nobody has a quota."""

    def check_sample(self, tenant: Tenant, revision: Digest | None) -> None:
        pass


@pytest.fixture
def completions(worker: ScriptedWorker) -> Completions:
    target = Target(worker, worker.base, REVISION, "acme/support", "prod")  # type: ignore[arg-type]
    targets, limits = OneTarget(target), NoLimits()
    return Completions(targets, TokenizerCache(), limits, Counted())  # type: ignore[arg-type]


def chat(completions: Completions, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "hi"}]
    request = parse_chat({"model": "acme/support", "messages": messages, **fields})
    return completions.open_chat(ACME, request)


def text(completions: Completions, prompt: Any = "hi", **fields: Any) -> Any:
    request = parse_completion({"model": "acme/support", "prompt": prompt, **fields})
    return completions.open_completion(ACME, request)


async def collect(answer: Answer) -> tuple[dict[int, str], Usage | None, list[Choice]]:
    texts: dict[int, str] = {}
    usage, pieces = None, []
    async for piece in answer.stream():
        if isinstance(piece, Usage):
            usage = piece
        else:
            pieces.append(piece)
            texts[piece.index] = texts.get(piece.index, "") + piece.text
    return texts, usage, pieces


async def test_a_stream_and_a_whole_answer_agree(completions: Completions) -> None:
    whole, usage = await (await chat(completions, n=2, stop="rl", logprobs=True)).whole()
    streamed = await chat(completions, n=2, stop="rl", logprobs=True, stream=True)
    texts, streamed_usage, pieces = await collect(streamed)
    assert [choice.text for choice in whole] == ["Hello wö"] * 2
    assert texts == {0: "Hello wö", 1: "Hello wö"}
    assert streamed_usage == usage and usage.prompt_tokens == 2
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop", "stop"]
    tokens = [token for piece in pieces if piece.index == 0 for token in piece.tokens]
    assert tuple(tokens) == whole[0].tokens


async def test_defaults_leave_the_context_to_a_chat_and_16_tokens_to_a_text(
    completions: Completions, worker: ScriptedWorker
) -> None:
    await (await chat(completions)).whole()
    await (await text(completions)).whole()
    await (await text(completions, prompt=[5] * (CONTEXT - 3))).whole()
    assert [work.params.max_tokens for work in worker.works] == [CONTEXT - 2, 16, 3]
    assert worker.works[0].params.stop_token_ids == (EOS,)
    assert worker.works[0].revision == REVISION


async def test_a_prompt_is_drawn_alike_alone_and_among_others(
    completions: Completions, worker: ScriptedWorker
) -> None:
    await (await text(completions, prompt=["a", "b"], seed=7, n=3)).whole()
    assert [work.params.seed for work in worker.works] == [7, 7]
    choices, _ = await (await text(completions, prompt=["a", "b"], n=3)).whole()
    assert [choice.index for choice in choices] == [0, 1, 2, 3, 4, 5]
    assert worker.works[2].params.seed != worker.works[3].params.seed


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ("", {}, "prompt"),
        ([[]], {}, "prompt"),
        ([258], {}, "prompt"),
        ([[1], [999]], {}, "prompt[1]"),
        ("x" * CONTEXT, {}, "prompt"),
        ("x" * 1_000_000, {}, "prompt"),
        ("x" * 100, {"max_tokens": CONTEXT - 99}, "max_tokens"),
    ],
)
async def test_what_cannot_run_is_refused_at_admission(
    completions: Completions, worker: ScriptedWorker, prompt: Any, fields: Any, param: str
) -> None:
    with pytest.raises(InvalidField) as failure:
        await text(completions, prompt=prompt, **fields)
    assert failure.value.param == param
    assert worker.works == []


async def test_an_answer_from_another_revision_is_withheld(
    completions: Completions, worker: ScriptedWorker
) -> None:
    worker.revision = None
    with pytest.raises(EngineFailed, match="pinned"):
        await (await chat(completions)).whole()
    with pytest.raises(EngineFailed, match="pinned"):
        await collect(await chat(completions, stream=True))


async def test_cancelling_a_whole_answer_cancels_every_prompt(
    completions: Completions, worker: ScriptedWorker
) -> None:
    worker.delay_seconds = 30
    task = asyncio.ensure_future((await text(completions, prompt=["a", "b"])).whole())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.num_cancelled == 2


async def test_closing_a_stream_cancels_the_work(
    completions: Completions, worker: ScriptedWorker
) -> None:
    worker.delay_seconds = 0.01
    stream = (await chat(completions, stream=True)).stream()
    await anext(stream)
    await stream.aclose()
    assert worker.num_cancelled == 1


async def test_a_refusal_by_the_engine_reaches_the_caller(
    completions: Completions, worker: ScriptedWorker
) -> None:
    worker.error = Overloaded("full", 3)
    with pytest.raises(Overloaded):
        await (await text(completions, prompt=["a", "b"])).whole()
    with pytest.raises(Overloaded):
        await collect(await text(completions, prompt=["a", "b"], stream=True))
    assert completions.counter.failed == []  # type: ignore[attr-defined]


async def test_answers_and_failures_of_an_alias_are_counted(
    completions: Completions, worker: ScriptedWorker
) -> None:
    counter: Any = completions.counter
    await (await chat(completions)).whole()
    await collect(await text(completions, prompt=["a", "b"], stream=True))
    assert counter.failed == [False] * 3
    worker.error = EngineFailed("a step failed")
    with pytest.raises(EngineFailed):
        await (await chat(completions)).whole()
    with pytest.raises(EngineFailed):
        await collect(await chat(completions, stream=True))
    assert counter.failed == [False] * 3 + [True] * 2
    worker.error = None
    targets: Any = completions.targets
    targets.target = replace(targets.target, alias=None)
    await (await chat(completions)).whole()
    assert len(counter.failed) == 5


async def test_a_request_is_split_by_its_client_or_by_itself(completions: Completions) -> None:
    for fields in ({"user": "ann"}, {"user": "ann"}, {}, {}):
        await chat(completions, **fields)
    keys = completions.targets.keys  # type: ignore[attr-defined]
    assert keys[0] == keys[1] and len(set(keys)) == 3


async def test_a_request_keeps_the_revision_it_was_admitted_with(
    completions: Completions, worker: ScriptedWorker
) -> None:
    answer = await chat(completions)
    targets: Any = completions.targets
    targets.target = replace(targets.target, revision=None)
    await answer.whole()
    assert worker.works[0].revision == REVISION
    assert answer.ran.revision == REVISION
