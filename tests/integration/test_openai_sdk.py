"""The unmodified `openai` SDK against a real server with the embedded base."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.servers import TestServer

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def key(server: TestServer) -> str:
    return server.make_key("openai-suite", "serve")


@pytest.fixture(scope="module")
def client(server: TestServer, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, server: TestServer, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": server.base, "messages": PARIS, **GREEDY, **fields}
    )


def base_stats(server: TestServer, key: str) -> dict[str, Any]:
    answer = httpx.get(
        f"{server.url}/catalog/v1/stats", headers={"Authorization": f"Bearer {key}"}, timeout=30
    )
    answer.raise_for_status()
    stats: dict[str, Any] = next(
        base for base in answer.json()["bases"] if base["base"] == server.base
    )
    return stats


def wait_until_idle(server: TestServer, key: str) -> dict[str, Any]:
    """The base's stats once no sequence runs; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        stats = base_stats(server, key)
        if stats["num_running_sequences"] == stats["num_waiting_sequences"] == 0:
            return stats
        assert time.monotonic() < deadline, stats
        time.sleep(0.2)


def test_models_lists_the_base(client: openai.OpenAI, server: TestServer) -> None:
    models = {model.id: model for model in client.models.list()}
    assert server.base in models
    assert client.models.retrieve(server.base).id == server.base
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/nothing")


def test_the_base_knows_paris_and_says_what_ran(client: openai.OpenAI, server: TestServer) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=server.base, messages=PARIS, **GREEDY
    )
    answer = raw.parse()
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert "<|im_end|>" not in (choice.message.content or "")
    ran = answer.model_extra["openmint"]
    assert ran["base"] == server.base and ran["revision"] is None
    assert raw.headers["X-OpenMint-Base"] == server.base
    assert raw.headers["X-OpenMint-Revision"] == "base"
    assert answer.system_fingerprint.startswith("fp_")
    usage = answer.usage
    assert usage and usage.prompt_tokens > 10
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_equals_the_whole_answer(client: openai.OpenAI, server: TestServer) -> None:
    whole = chat(client, server)
    stream = chat(client, server, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.model_extra["openmint"]["base"] == server.base for c in chunks)


def test_the_wire_of_a_stream(server: TestServer, key: str) -> None:
    body = {"model": server.base, "messages": PARIS, **GREEDY, "stream": True}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-openmint-base"] == server.base
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_n_and_seed_draw_distinct_but_repeatable_choices(
    client: openai.OpenAI, server: TestServer
) -> None:
    draw = {"n": 4, "seed": 11, "temperature": 1.0, "max_tokens": 12}
    story = [{"role": "user", "content": "Begin a story."}]
    first, second = (chat(client, server, messages=story, **draw) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_trimmed(client: openai.OpenAI, server: TestServer, stream: bool) -> None:
    answer = chat(client, server, stop=["Paris", "zzz"], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert "Par" not in text and "France" in text
    assert reason == "stop"


def test_the_length_limit_is_a_finish_reason(client: openai.OpenAI, server: TestServer) -> None:
    answer = chat(client, server, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_logprobs_rank_the_greedy_token_first(client: openai.OpenAI, server: TestServer) -> None:
    answer = chat(client, server, logprobs=True, top_logprobs=3, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-3)
        assert token.logprob <= 0


def test_text_completions_take_every_form_of_prompt(
    client: openai.OpenAI, server: TestServer
) -> None:
    text = "The capital of France is"
    draw: dict[str, Any] = {"model": server.base, "temperature": 0, "max_tokens": 4}
    answer = client.completions.create(prompt=text, logprobs=2, **draw)
    assert "Paris" in answer.choices[0].text
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.text_offset
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset[0] == 0
    both = client.completions.create(prompt=[text, "1 2 3 4"], **draw)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == answer.choices[0].text
    ids = client.completions.create(prompt=[504, 3575, 282, 4649, 314], **draw)
    lists = client.completions.create(prompt=[[504, 3575, 282, 4649, 314]], **draw)
    assert ids.choices[0].text == lists.choices[0].text
    streamed = client.completions.create(prompt=text, stream=True, **draw)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_a_repeated_prompt_reports_cached_tokens(client: openai.OpenAI, server: TestServer) -> None:
    long = [{"role": "user", "content": "Count: " + " ".join(map(str, range(200)))}]
    chat(client, server, messages=long, max_tokens=1)
    usage = chat(client, server, messages=long, max_tokens=1).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 1_000_000}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"messages": [{"role": "user", "content": "x " * 20_000}]}, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_name_the_field(
    client: openai.OpenAI, server: TestServer, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        chat(client, server, stream=stream, **fields)
    assert failure.value.param == param
    assert failure.value.type == "invalid_request_error"
    assert re.search("remove|must|at most|needs|fit|tokens", failure.value.message)


def test_unknown_models_and_keys(client: openai.OpenAI, server: TestServer) -> None:
    for model in ("nobody/nothing", "nope", "tinker://x:train:0/sampler_weights/y", "a/b/c@d@e"):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            chat(client, server, model=model)
    with pytest.raises(openai.AuthenticationError):
        chat(client.with_options(api_key="tml-om_wrong_key"), server)


def test_nan_and_malformed_bodies_are_400(server: TestServer, key: str) -> None:
    bodies = [b'{"model": "x", "messages": [], "temperature": NaN}', b"{", b"[1]", b"\xff\xfe"]
    for body in bodies:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
        assert answer.headers["x-request-id"]


async def test_32_concurrent_requests(server: TestServer, key: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=key, max_retries=0
    ) as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=server.base,
                    messages=[{"role": "user", "content": f"Say the number {i}."}],
                    max_tokens=8,
                    seed=i,
                )
                for i in range(32)
            )
        )
    assert len(answers) == 32
    assert all(answer.usage.completion_tokens <= 8 for answer in answers)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_pages(
    server: TestServer, key: str, stream: bool
) -> None:
    before = wait_until_idle(server, key)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=key, max_retries=0
    ) as client:
        task = asyncio.ensure_future(
            client.chat.completions.create(
                model=server.base,
                messages=[{"role": "user", "content": "Write a very long story."}],
                max_tokens=4000,
                n=2,
                temperature=1.5,
                stream=stream,
            )
        )
        if stream:
            answer = await task
            await anext(aiter(answer))
            await answer.close()
        else:
            await asyncio.sleep(1.5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    after = wait_until_idle(server, key)
    # Pages of finished prompts may stay cached; those of 8,000 tokens of story may not.
    assert after["kv_pages_used"] - before["kv_pages_used"] < 100
    assert after["generated_tokens"] - before["generated_tokens"] < 2000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
