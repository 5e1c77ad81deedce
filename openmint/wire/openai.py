"""OpenAI JSON <-> our values, for chat and text completions. Decides nothing about models.

Every field of a request is either understood, or accepted because it changes nothing, or refused by
name: a field is never ignored. Shape suffixes: T prompt tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openmint.errors import InvalidRequest
from openmint.scheduler.work import Spent
from openmint.types import Priority

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_TEMPERATURE = 2.0
MAX_MODEL_CHARS = 512
MAX_LOAD_SECONDS = 3600.0
SERVICE_TIERS = {
    "auto": Priority.INTERACTIVE,
    "default": Priority.INTERACTIVE,
    "priority": Priority.INTERACTIVE,
    "flex": Priority.BATCH,
}
"""OpenAI's name for how urgent a request is."""
LOWEST_LOGPROB = -9999.0
"""What JSON shows for minus infinity, as OpenAI does."""

Json = dict[str, Any]

COMMON_FIELDS = frozenset(
    {
        "load_deadline_seconds",
        "logprobs",
        "max_tokens",
        "model",
        "n",
        "seed",
        "service_tier",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
    }
)
CHAT_FIELDS = COMMON_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt"}
CLIENT_FIELDS = ("safety_identifier", "user", "prompt_cache_key")
"""Accepted with any value. The first that is there says whose request it is, which matters only
where an alias has a canary: the same client stays on the same side."""
INERT_FIELDS = frozenset({"metadata", *CLIENT_FIELDS})
"""Accepted with any value, because no revision's answer depends on them."""
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Known fields that we don't serve, with the values (null besides) that ask for nothing."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NEUTRAL_MESSAGE_FIELDS = ("refusal", "audio", "function_call", "tool_calls", "annotations")


class InvalidField(InvalidRequest):
    """One field of the request is wrong; `param` names it in the error envelope."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class UnsupportedField(InvalidField):
    """A field that OpenMinT doesn't serve, or doesn't know."""

    code = "unsupported_parameter"


@dataclass(frozen=True, slots=True)
class Drawing:
    """How the choices of a request are drawn and shown, and how long they may wait for that."""

    n: int
    seed: int | None
    stop: tuple[str, ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    logprobs: bool
    num_top_logprobs: int
    stream: bool
    include_usage: bool
    priority: Priority = Priority.INTERACTIVE
    load_seconds: float | None = None
    """For the revision to be in memory; None leaves it to the worker."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    model: str
    messages: tuple[dict[str, str], ...]
    drawing: Drawing
    client: str | None = None
    """Whose request it is, if it says so."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    drawing: Drawing
    client: str | None = None


@dataclass(frozen=True, slots=True)
class TokenText:
    """One generated token as a client sees it, with the likeliest alternatives."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Ran:
    """What answered, as every response names it."""

    model: str
    base: str
    base_digest: str
    revision: str | None
    policy: str | None
    alias: str | None
    epoch: int
    """Which worker of the base; see SampleResult."""

    @property
    def fingerprint(self) -> str:
        revision = self.revision.removeprefix("sha256:")[:12] if self.revision else "base"
        return f"fp_{self.base_digest.removeprefix('sha256:')[:12]}_{revision}"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    spent: Spent = field(default_factory=Spent)
    """By the prompt that took longest."""
    epoch: int = 0
    """Of the worker that gave the last answer."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A finished choice, or in a stream what is new of one; `finish_reason` None means more."""

    index: int
    text: str
    tokens: tuple[TokenText, ...] = ()
    finish_reason: str | None = None
    first: bool = False
    text_offset: int = 0
    """Where `text` begins in the whole text of the choice."""


# -- requests -------------------------------------------------------------------------------------


def parse_json(body: bytes) -> Json:
    """The object in a request body. Raises InvalidRequest for anything but strict JSON."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def parse_chat(body: Json) -> ChatRequest:
    """A chat completion request. Raises InvalidField that names the first field that is wrong."""
    _refuse_unknown(body, CHAT_FIELDS)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidField("messages", "must be a list of at least one message")
    parsed = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    logprobs = _flag(body, "logprobs")
    num_top = _whole(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if num_top is not None and not logprobs:
        raise InvalidField("top_logprobs", "needs logprobs: true")
    limits = [_whole(body, name, 1) for name in ("max_completion_tokens", "max_tokens")]
    if None not in limits and limits[0] != limits[1]:
        raise InvalidField("max_tokens", "differs from max_completion_tokens; send one of them")
    max_tokens = limits[0] if limits[0] is not None else limits[1]
    drawing = _drawing(body, max_tokens, logprobs, num_top or 0)
    return ChatRequest(_model(body), parsed, drawing, _client(body))


def parse_completion(body: Json) -> CompletionRequest:
    """A text completion request. Raises InvalidField that names the first field that is wrong."""
    _refuse_unknown(body, COMPLETION_FIELDS)
    num_top = _whole(body, "logprobs", 0, MAX_TOP_LOGPROBS)
    drawing = _drawing(body, _whole(body, "max_tokens", 1), num_top is not None, num_top or 0)
    prompts = _prompts(body.get("prompt"))
    if len(prompts) * drawing.n > MAX_CHOICES:
        raise InvalidField("prompt", f"prompts times n is at most {MAX_CHOICES}; send fewer")
    return CompletionRequest(_model(body), prompts, drawing, _client(body))


def _drawing(body: Json, max_tokens: int | None, logprobs: bool, num_top: int) -> Drawing:
    n = _whole(body, "n", 1, MAX_CHOICES)
    temperature = _number(body, "temperature", 0.0, MAX_TEMPERATURE)
    top_p = _number(body, "top_p", 0.0, 1.0)
    if top_p == 0.0:
        raise InvalidField("top_p", "must be above 0 and at most 1; temperature 0 is greedy")
    stream = _flag(body, "stream")
    return Drawing(
        n=1 if n is None else n,
        seed=_whole(body, "seed", -(2**63), 2**63 - 1),
        stop=_stop(body.get("stop")),
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        logprobs=logprobs,
        num_top_logprobs=num_top,
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream),
        priority=_priority(body.get("service_tier")),
        load_seconds=_number(body, "load_deadline_seconds", 0.0, MAX_LOAD_SECONDS),
    )


def _priority(tier: Any) -> Priority:
    if tier is None:
        return Priority.INTERACTIVE
    if not isinstance(tier, str) or tier not in SERVICE_TIERS:
        raise InvalidField("service_tier", f"must be one of {', '.join(SERVICE_TIERS)}")
    return SERVICE_TIERS[tier]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_unknown(body: Json, known: frozenset[str]) -> None:
    for name, value in body.items():
        if name in known or name in INERT_FIELDS or value is None:
            continue
        if name not in NEUTRAL_VALUES:
            raise UnsupportedField(name, "unknown field; remove it")
        if not any(value == neutral for neutral in NEUTRAL_VALUES[name]):
            raise UnsupportedField(name, "not supported by OpenMinT; remove the field")


def _model(body: Json) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_CHARS:
        raise InvalidField(
            "model", "must be a base, tenant/policy, …@alias, …@sha256:… or tinker://…"
        )
    return _unicode(model, "model")


def _client(body: Json) -> str | None:
    for name in CLIENT_FIELDS:
        if body.get(name) is not None:
            return json.dumps(body[name], sort_keys=True)
    return None


def _flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidField(name, "must be true or false")
    return bool(value)


def _whole(body: Json, name: str, low: int, high: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidField(name, f"must be a whole number {limits}")
    if value < low or (high is not None and value > high):
        raise InvalidField(name, f"must be a whole number {limits}, got {_short(value)}")
    return value


def _number(body: Json, name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidField(name, f"must be a number from {low:g} to {high:g}")
    if not low <= value <= high:
        raise InvalidField(name, f"must be from {low:g} to {high:g}, got {_short(value)}")
    return float(value)


def _short(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:40]


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise InvalidField("stop", f"must be a text or a list of at most {MAX_STOPS} texts")
    if not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidField("stop", f"each text must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(_unicode(stop, "stop") for stop in stops)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise InvalidField("stream_options", "needs stream: true")
    if not isinstance(options, dict):
        raise InvalidField("stream_options", "must be an object")
    for name, value in options.items():
        if name != "include_usage" and not (name == "include_obfuscation" and not value):
            raise UnsupportedField(f"stream_options.{name}", "not supported by OpenMinT")
    return _flag(options, "include_usage")


def _message(raw: Any, where: str) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise InvalidField(where, "must be an object with role and content")
    role = raw.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidField(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    for name, value in raw.items():
        if name in ("role", "content") or value is None:
            continue
        if name not in NEUTRAL_MESSAGE_FIELDS or value != []:
            raise UnsupportedField(f"{where}.{name}", "not supported by OpenMinT; remove the field")
    return {"role": ROLES[role], "content": _content(raw.get("content"), f"{where}.content")}


def _content(raw: Any, where: str) -> str:
    if isinstance(raw, str):
        return _unicode(raw, where)
    if not isinstance(raw, list):
        raise InvalidField(where, "must be a text or a list of text parts")
    texts = []
    for i, part in enumerate(raw):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidField(f"{where}[{i}]", "must be an object with type and text")
        if part["type"] != "text":
            raise UnsupportedField(f"{where}[{i}].type", "only text parts are supported")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise InvalidField(f"{where}[{i}]", "a text part has exactly type and text")
        texts.append(_unicode(part["text"], where))
    return "".join(texts)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidField(where, "holds a lone surrogate, which is not valid Unicode") from None
    return text


def _prompts(raw: Any) -> tuple[str | tuple[int, ...], ...]:
    """One or many prompts, each a text or token ids; ids are checked against the base later."""
    if isinstance(raw, str):
        return (_unicode(raw, "prompt"),)
    if not isinstance(raw, list) or not raw:
        raise InvalidField("prompt", "must be a text, texts, token ids or lists of token ids")
    if all(isinstance(part, str) for part in raw):
        return tuple(_unicode(part, f"prompt[{i}]") for i, part in enumerate(raw))
    if all(_is_token(part) for part in raw):
        return (tuple(raw),)
    if all(isinstance(part, list) and all(map(_is_token, part)) for part in raw):
        return tuple(tuple(part) for part in raw)
    raise InvalidField("prompt", "must be a text, texts, token ids or lists of token ids")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


# -- answers --------------------------------------------------------------------------------------


def chat_response(
    answer_id: str, created: int, ran: Ran, choices: Sequence[Choice], usage: Usage, logprobs: bool
) -> Json:
    """A whole `chat.completion`."""
    rendered = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _chat_logprobs(choice.tokens) if logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    head = _head(answer_id, "chat.completion", created, ran)
    return {**head, "choices": rendered, "usage": _usage(usage)}


def chat_chunk(answer_id: str, created: int, ran: Ran, choice: Choice, logprobs: bool) -> Json:
    """A `chat.completion.chunk` with what is new of one choice."""
    delta: Json = {"role": "assistant"} if choice.first else {}
    if choice.first or choice.text:
        delta["content"] = choice.text
    rendered = {
        "index": choice.index,
        "delta": delta,
        "logprobs": _chat_logprobs(choice.tokens) if logprobs and choice.tokens else None,
        "finish_reason": choice.finish_reason,
    }
    return {**_head(answer_id, "chat.completion.chunk", created, ran), "choices": [rendered]}


def completion_response(
    answer_id: str, created: int, ran: Ran, choices: Sequence[Choice], usage: Usage, logprobs: bool
) -> Json:
    """A whole `text_completion`."""
    rendered = [_completion_choice(choice, logprobs) for choice in choices]
    head = _head(answer_id, "text_completion", created, ran)
    return {**head, "choices": rendered, "usage": _usage(usage)}


def completion_chunk(
    answer_id: str, created: int, ran: Ran, choice: Choice, logprobs: bool
) -> Json:
    """A streamed `text_completion` with what is new of one choice."""
    rendered = _completion_choice(choice, logprobs and bool(choice.tokens))
    return {**_head(answer_id, "text_completion", created, ran), "choices": [rendered]}


def usage_chunk(answer_id: str, created: int, ran: Ran, usage: Usage, chat: bool) -> Json:
    """The last chunk of a stream that asked for `include_usage`: no choices, only counts."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {**_head(answer_id, kind, created, ran), "choices": [], "usage": _usage(usage)}


def model_card(model: str, owner: str, created: int, extra: Json) -> Json:
    """One entry of `/v1/models`; `extra` goes under our own name, as standard clients expect."""
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "openmint": extra,
    }


def _head(answer_id: str, kind: str, created: int, ran: Ran) -> Json:
    return {
        "id": answer_id,
        "object": kind,
        "created": created,
        "model": ran.model,
        "system_fingerprint": ran.fingerprint,
        "openmint": {
            "revision": ran.revision,
            "base": ran.base,
            "base_digest": ran.base_digest,
            "policy": ran.policy,
            "alias": ran.alias,
            "epoch": ran.epoch,
        },
    }


def _usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def _chat_logprobs(tokens: Sequence[TokenText]) -> Json:
    def entry(text: str, raw: bytes, logprob: float) -> Json:
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        {**entry(t.text, t.raw, t.logprob), "top_logprobs": [entry(*top) for top in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def _completion_choice(choice: Choice, logprobs: bool) -> Json:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": _completion_logprobs(choice) if logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def _completion_logprobs(choice: Choice) -> Json:
    offsets, at = [], choice.text_offset
    for token in choice.tokens:
        offsets.append(at)
        at += len(token.text)
    return {
        "tokens": [token.text for token in choice.tokens],
        "token_logprobs": [_finite(token.logprob) for token in choice.tokens],
        "top_logprobs": [_top_by_text(token) for token in choice.tokens],
        "text_offset": offsets,
    }


def _top_by_text(token: TokenText) -> dict[str, float]:
    """Alternatives by their text, the likelier winning when two tokens read the same."""
    by_text: dict[str, float] = {}
    for text, _, logprob in (*token.top, (token.text, token.raw, token.logprob)):
        by_text.setdefault(text, _finite(logprob))
    return by_text
