"""OpenAI completions: one admission, one pinned revision, one answer, whole or streamed.

Admission resolves the model to one revision digest, tokenizes and checks every limit; after it a
promotion or rollback does not touch the request. The answer is refused when the engine reports
another revision than the pinned one. Lives on the gateway's event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from openmint.errors import EngineFailed, NonFinite, Overloaded, ServiceError
from openmint.scheduler.work import SampleDelta, SampleResult, SampleWork
from openmint.service.choices import ChoiceText
from openmint.service.limits import Limits
from openmint.service.targets import Target, Targets
from openmint.service.tokenizers import INLINE_CHARS, ChatMessage, Tokenizer, TokenizerCache
from openmint.types import BaseInfo, Digest, IntArray, SamplingParams, Tenant
from openmint.wire.openai import (
    ChatRequest,
    Choice,
    CompletionRequest,
    Drawing,
    InvalidField,
    Ran,
    Usage,
)

DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a text completion that names none, as OpenAI documents."""

T = TypeVar("T")


class AnswerCounter(Protocol):
    """Counts the answers of a policy's revision, and those that the engine failed to give."""

    def note_answer(self, tenant: Tenant, policy: str, digest: Digest, *, failed: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Completions:
    """Admits completion requests."""

    targets: Targets
    tokenizers: TokenizerCache
    limits: Limits
    counter: AnswerCounter

    async def open_chat(self, tenant: Tenant, request: ChatRequest) -> Answer:
        """An admitted chat. Raises NotFound for the model, InvalidField for what cannot run."""
        target = self.targets.resolve(tenant, request.model, _split_key(request))
        self.limits.check_sample(tenant, target.revision)
        return await self.admit_chat(
            tenant, target, request.model, request.messages, request.drawing
        )

    async def open_completion(self, tenant: Tenant, request: CompletionRequest) -> Answer:
        """Admitted prompts. Raises NotFound for the model, InvalidField for what cannot run."""
        target = self.targets.resolve(tenant, request.model, _split_key(request))
        self.limits.check_sample(tenant, target.revision)
        return await self.admit_prompts(
            tenant, target, request.model, request.prompts, request.drawing
        )

    async def admit_chat(
        self,
        tenant: Tenant,
        target: Target,
        model: str,
        messages: Sequence[ChatMessage],
        drawing: Drawing,
    ) -> Answer:
        """A chat on a target that is resolved already; `model` is what answers call it."""
        tokenizer = await self.tokenizers.get(target.base.directory)
        num_bytes = sum(len(message["content"].encode()) for message in messages)
        _refuse_oversized(tokenizer, target.base, num_bytes, "messages")
        prompt_T = await encode_chat(tokenizer, messages)
        params = _params(drawing, target.base, len(prompt_T), "messages", None)
        work = _work(tenant, target, prompt_T, params, drawing)
        return Answer(target, tokenizer, drawing, _ran(model, target), (work,), self.counter)

    async def admit_prompts(
        self,
        tenant: Tenant,
        target: Target,
        model: str,
        prompts: Sequence[str | tuple[int, ...]],
        drawing: Drawing,
    ) -> Answer:
        """Raw prompts on a target that is resolved already."""
        tokenizer = await self.tokenizers.get(target.base.directory)
        works = []
        for i, prompt in enumerate(prompts):
            where = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
            prompt_T = await _encode_prompt(tokenizer, target.base, prompt, where)
            limit = DEFAULT_COMPLETION_TOKENS
            params = _params(drawing, target.base, len(prompt_T), where, limit)
            works.append(_work(tenant, target, prompt_T, params, drawing))
        ran = _ran(model, target)
        return Answer(target, tokenizer, drawing, ran, tuple(works), self.counter)


@dataclass(frozen=True, slots=True)
class Answer:
    """An admitted request, bound to what `ran` names; run it once, whole or as a stream."""

    target: Target
    tokenizer: Tokenizer
    drawing: Drawing
    ran: Ran
    works: tuple[SampleWork, ...]
    counter: AnswerCounter

    async def whole(self) -> tuple[list[Choice], Usage]:
        """Every choice, finished. Cancelling frees the engine's pages.

        Raises what the engine raised, and EngineFailed when another revision ran.
        """
        results = await together([self._call(work) for work in self.works])
        choices, num_generated = [], 0
        for prompt_index, result in enumerate(results):
            for i, sequence in enumerate(result.sequences):
                text = self._choice_text(prompt_index, i)
                shown = text.feed(
                    sequence.tokens_N.tolist(), sequence.logprobs_N.tolist(), sequence.top_logprobs
                )
                choices.append(_joined(shown, text.finish(sequence.stop_reason)))
                num_generated += text.num_tokens
        return choices, self._usage(results, num_generated)

    async def stream(self) -> AsyncIterator[Choice | Usage]:
        """Pieces of choices as they appear, each choice's end, then the usage.

        Closing the iterator cancels the work. Raises like `whole`, possibly after pieces.
        """
        queue: asyncio.Queue[Choice | SampleResult | Exception] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._pump(i, work, queue)) for i, work in enumerate(self.works)
        ]
        results: list[SampleResult] = []
        try:
            while len(results) < len(self.works):
                piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, SampleResult):
                    results.append(piece)
                else:
                    yield piece
            num_generated = sum(
                len(sequence.tokens_N) for result in results for sequence in result.sequences
            )
            yield self._usage(results, num_generated)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, work: SampleWork) -> SampleResult:
        with self._counted(work):
            result = await self.target.client.call(work)
            assert isinstance(result, SampleResult)
            self._check(result)
            return result

    async def _pump(
        self,
        prompt_index: int,
        work: SampleWork,
        queue: asyncio.Queue[Choice | SampleResult | Exception],
    ) -> None:
        """Feed one prompt's pieces, then its result, to `queue`; a failure goes there too."""
        texts = [self._choice_text(prompt_index, i) for i in range(work.num_samples)]
        try:
            with self._counted(work):
                async with aclosing(self.target.client.stream(work)) as events:  # type: ignore[type-var]
                    async for event in events:
                        if isinstance(event, SampleDelta):
                            text = texts[event.sample_index]
                            shown = text.feed(event.tokens, event.logprobs, event.top_logprobs)
                            if shown:
                                queue.put_nowait(shown)
                        else:
                            self._check(event)
                            for text, sequence in zip(texts, event.sequences, strict=True):
                                queue.put_nowait(text.finish(sequence.stop_reason))
                            queue.put_nowait(event)
        except Exception as error:
            queue.put_nowait(error)

    @contextmanager
    def _counted(self, work: SampleWork) -> Iterator[None]:
        """Count the answer for its alias: failed when the engine, not the caller, is to blame."""
        try:
            yield
        except Overloaded:
            raise
        except (ServiceError, NonFinite):
            self._count(work, failed=True)
            raise
        self._count(work, failed=False)

    def _count(self, work: SampleWork, *, failed: bool) -> None:
        target = self.target
        if target.alias and target.policy and target.revision:
            policy = target.policy.partition("/")[2]
            self.counter.note_answer(work.tenant, policy, target.revision, failed=failed)

    def _check(self, result: SampleResult) -> None:
        pinned = (self.target.revision, self.target.base.digest)
        if (result.revision, result.base) != pinned:
            raise EngineFailed(
                f"revision {result.revision} of base {result.base} ran where {pinned[0]} of "
                f"{pinned[1]} was pinned; the answer is withheld"
            )

    def _choice_text(self, prompt_index: int, sample_index: int) -> ChoiceText:
        index = prompt_index * self.drawing.n + sample_index
        eos_ids = frozenset(self.target.base.eos_token_ids)
        return ChoiceText(index, self.tokenizer, self.drawing.stop, eos_ids)

    def _usage(self, results: Sequence[SampleResult], num_generated: int) -> Usage:
        num_prompt = sum(len(work.prompt_T) for work in self.works)
        num_cached = sum(result.num_cached_tokens for result in results)
        longest = max((result.spent for result in results), key=lambda spent: spent.seconds)
        epoch = max(result.epoch for result in results)
        return Usage(num_prompt, num_generated, num_cached, longest, epoch)


async def encode_chat(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> IntArray:
    """Tokens of a conversation; a long one is tokenized off the event loop."""
    if sum(len(message["content"]) for message in messages) <= INLINE_CHARS:
        return tokenizer.encode_chat(messages)
    return await asyncio.to_thread(tokenizer.encode_chat, messages)


async def encode_text(tokenizer: Tokenizer, text: str) -> IntArray:
    """Tokens of a raw prompt; a long one is tokenized off the event loop."""
    if len(text) <= INLINE_CHARS:
        return tokenizer.encode(text)
    return await asyncio.to_thread(tokenizer.encode, text)


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. When one fails or the caller is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _encode_prompt(
    tokenizer: Tokenizer, base: BaseInfo, prompt: str | tuple[int, ...], where: str
) -> IntArray:
    if isinstance(prompt, str):
        _refuse_oversized(tokenizer, base, len(prompt.encode()), where)
        return await encode_text(tokenizer, prompt)
    if prompt and max(prompt) >= base.vocab_size:
        limit = f"the base knows ids below {base.vocab_size}"
        raise InvalidField(where, f"token id {max(prompt)} is out of the vocabulary; {limit}")
    return np.asarray(prompt, dtype=np.int64)


def _refuse_oversized(tokenizer: Tokenizer, base: BaseInfo, num_bytes: int, where: str) -> None:
    """Refuse what cannot fit in the context before paying for its tokenization."""
    if tokenizer.cannot_fit(num_bytes, base.context_length):
        limit = f"the context of {base.context_length} tokens"
        raise InvalidField(where, f"{num_bytes} bytes of text cannot fit in {limit}; shorten it")


def _params(
    drawing: Drawing,
    base: BaseInfo,
    num_prompt_tokens: int,
    where: str,
    default_max_tokens: int | None,
) -> SamplingParams:
    if num_prompt_tokens == 0:
        raise InvalidField(where, "is empty; send at least one token")
    room = base.context_length - num_prompt_tokens
    context = f"the context of {base.name} is {base.context_length} tokens"
    if room < 1:
        raise InvalidField(where, f"has {num_prompt_tokens} tokens; {context}; shorten it")
    if drawing.max_tokens is not None and drawing.max_tokens > room:
        prompt = f"{num_prompt_tokens} are the prompt; ask for at most {room}"
        raise InvalidField("max_tokens", f"{drawing.max_tokens} is too many: {context}, {prompt}")
    seed = secrets.randbits(62) if drawing.seed is None else drawing.seed % 2**62
    return SamplingParams(
        max_tokens=drawing.max_tokens or min(default_max_tokens or room, room),
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        seed=seed,
        stop_token_ids=base.eos_token_ids,
        stop_strings=drawing.stop,
    )


def _work(
    tenant: Tenant, target: Target, prompt_T: IntArray, params: SamplingParams, drawing: Drawing
) -> SampleWork:
    return SampleWork(
        tenant=tenant,
        revision=target.revision,
        prompt_T=prompt_T,
        params=params,
        num_samples=drawing.n,
        topk_sample_logprobs=drawing.num_top_logprobs,
        stream=drawing.stream,
        priority=drawing.priority,
        load_seconds=drawing.load_seconds,
    )


def _split_key(request: ChatRequest | CompletionRequest) -> str:
    """Whose request it is; one that doesn't say is nobody else's."""
    return request.client or secrets.token_hex(16)


def _ran(model: str, target: Target) -> Ran:
    base = target.base
    epoch = target.client.epoch
    return Ran(model, base.name, base.digest, target.revision, target.policy, target.alias, epoch)


def _joined(shown: Choice | None, end: Choice) -> Choice:
    """A choice's only piece and its end as one whole choice."""
    if shown is None:
        return end
    return Choice(end.index, shown.text + end.text, shown.tokens + end.tokens, end.finish_reason)
