import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from openmint.errors import InvalidRequest
from openmint.wire.openai import (
    Choice,
    InvalidField,
    Ran,
    TokenText,
    Usage,
    chat_chunk,
    chat_response,
    completion_response,
    parse_chat,
    parse_completion,
    parse_json,
    usage_chunk,
)

DIGEST = "sha256:" + "ab" * 32
RAN = Ran("acme/support@prod", "tiny", "sha256:" + "cd" * 32, DIGEST, "acme/support", "prod", 3)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", **fields}


def test_a_plain_chat_has_openai_defaults() -> None:
    request = parse_chat(chat())
    assert request.messages == ({"role": "user", "content": "hi"},)
    drawing = request.drawing
    assert (drawing.n, drawing.seed, drawing.temperature, drawing.top_p) == (1, None, 1.0, 1.0)
    assert (drawing.stop, drawing.max_tokens, drawing.stream) == ((), None, False)


def test_text_parts_join_and_developer_speaks_as_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_chat(chat(messages=[{"role": "developer", "content": parts}]))
    assert request.messages == ({"role": "system", "content": "ab"},)


def test_an_answer_can_be_sent_back_as_history() -> None:
    history = {"role": "assistant", "content": "hello", "refusal": None, "annotations": []}
    assert parse_chat(chat(messages=[history])).messages[0]["content"] == "hello"


def test_fields_that_change_nothing_are_accepted() -> None:
    parse_chat(
        chat(
            user="u",
            metadata={"a": "b"},
            presence_penalty=0,
            frequency_penalty=0.0,
            logit_bias={},
            tools=[],
            tool_choice="none",
            response_format={"type": "text"},
            modalities=["text"],
            service_tier="auto",
            store=False,
            audio=None,
            surprise=None,
        )
    )
    parse_completion(text(best_of=1, echo=False, suffix=None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"1": 5}),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("modalities", ["text", "audio"]),
        ("audio", {}),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("best_of", 3),
        ("suffix", "x"),
        ("echo", True),
        ("top_k", 5),
        ("surprise", 1),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(field: str, value: Any) -> None:
    for parse, body in ((parse_chat, chat()), (parse_completion, text())):
        with pytest.raises(InvalidField) as failure:
            parse({**body, field: value})
        assert failure.value.param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"model": "\ud800"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "a"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_values_out_of_range_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidField) as failure:
        parse_chat(chat(**fields))
    assert failure.value.param == param


@pytest.mark.parametrize("prompt", [None, [], 5, [1, "a"], [[1], "a"], [-1], [1.0], [2**31]])
def test_malformed_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidField) as failure:
        parse_completion(text(prompt=prompt))
    assert failure.value.param == "prompt"


def test_the_four_forms_of_a_prompt() -> None:
    assert parse_completion(text(prompt="a")).prompts == ("a",)
    assert parse_completion(text(prompt=["a", "b"])).prompts == ("a", "b")
    assert parse_completion(text(prompt=[1, 2])).prompts == ((1, 2),)
    assert parse_completion(text(prompt=[[1], [2, 3]])).prompts == ((1,), (2, 3))


def test_prompts_times_n_is_bounded() -> None:
    with pytest.raises(InvalidField, match="128"):
        parse_completion(text(prompt=["a"] * 65, n=2))


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"temperature": NaN}', b"\xff", b"[" * 100_000])
def test_only_strict_json_objects_are_read(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_json(body)


TOKENS = (
    TokenText(" Par", b" Par", -0.5, ((" Par", b" Par", -0.5), (" Lyon", b" Lyon", -2.0))),
    TokenText("is", b"is", float("-inf")),
)


def test_a_chat_answer_is_what_the_sdk_reads() -> None:
    choices = [Choice(0, " Paris", TOKENS, "stop")]
    content = chat_response("chatcmpl-1", 1, RAN, choices, Usage(3, 2, 1), True)
    answer = ChatCompletion.model_validate_json(json.dumps(content))
    assert answer.choices[0].message.content == " Paris"
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and logprobs.content[1].logprob == -9999.0
    assert logprobs.content[0].top_logprobs[1].token == " Lyon"
    assert answer.usage and answer.usage.total_tokens == 5
    assert content["openmint"] == {
        "revision": DIGEST,
        "base": "tiny",
        "base_digest": RAN.base_digest,
        "policy": "acme/support",
        "alias": "prod",
        "epoch": 3,
    }
    assert answer.system_fingerprint == "fp_cdcdcdcdcdcd_abababababab"


def test_chunks_are_what_the_sdk_reads() -> None:
    first = chat_chunk("c", 1, RAN, Choice(0, "", first=True), False)
    assert ChatCompletionChunk.model_validate(first).choices[0].delta.role == "assistant"
    last = chat_chunk("c", 1, RAN, Choice(0, "", finish_reason="length"), True)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    usage = ChatCompletionChunk.model_validate(usage_chunk("c", 1, RAN, Usage(1, 2, 0), True))
    assert usage.choices == [] and usage.usage and usage.usage.completion_tokens == 2


def test_text_logprobs_carry_offsets() -> None:
    choices = [Choice(0, " Paris", TOKENS, "stop", text_offset=4)]
    content = completion_response("cmpl-1", 1, RAN, choices, Usage(3, 2, 0), True)
    logprobs = Completion.model_validate(content).choices[0].logprobs
    assert logprobs and logprobs.text_offset == [4, 8]
    assert logprobs.top_logprobs and logprobs.top_logprobs[0] == {" Par": -0.5, " Lyon": -2.0}


def test_a_request_says_whose_it_is() -> None:
    assert parse_chat(chat()).client is None
    assert parse_chat(chat(user="ann")).client == parse_chat(chat(user="ann", seed=1)).client
    assert parse_chat(chat(user="ann")).client != parse_chat(chat(user="bob")).client
    both = chat(user="ann", safety_identifier="s", prompt_cache_key="k")
    assert parse_chat(both).client == parse_chat(chat(safety_identifier="s")).client
    assert parse_chat(chat(user={"id": 1})).client is not None
    assert (
        parse_completion(text(prompt_cache_key="k")).client
        == parse_chat(chat(prompt_cache_key="k")).client
    )
