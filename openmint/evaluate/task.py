"""Evaluation tasks: a named set of prompts, each with its answer, and how to score them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from openmint.errors import InvalidRequest
from openmint.evaluate.patterns import check_pattern
from openmint.evaluate.scorers import SCORER_NAMES, ScorerName, last_number
from openmint.types import Digest

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
ROLES = ("system", "user", "assistant")
MAX_ITEMS = 10_000
MAX_CHOICES = 64
MAX_STOPS = 16
FIELDS = ("name", "scorer", "choices", "max_tokens", "stop", "items")


@dataclass(frozen=True, slots=True)
class EvaluationItem:
    """One question: chat messages, or a text that the model continues; and its answer."""

    prompt: str | tuple[tuple[str, str], ...]
    """Raw text, or (role, content) pairs for the chat template."""
    answer: str


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    name: str
    scorer: ScorerName
    items: tuple[EvaluationItem, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def task_digest(task: EvaluationTask) -> Digest:
    """The task's identity: sha256 of its canonical JSON. Any change of a task changes it."""
    text = json.dumps(encode_task(task), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Digest("sha256:" + hashlib.sha256(text.encode()).hexdigest())


def encode_task(task: EvaluationTask) -> dict[str, Any]:
    """The JSON form that `parse_task` reads, defaults included."""
    return {
        "name": task.name,
        "scorer": task.scorer,
        "choices": list(task.choices),
        "max_tokens": task.max_tokens,
        "stop": list(task.stop),
        "items": [_encode_item(item) for item in task.items],
    }


def parse_task(raw: object) -> EvaluationTask:
    """A task from decoded JSON. Raises InvalidRequest that names the field, limit and remedy."""
    if not isinstance(raw, Mapping):
        raise InvalidRequest("a task is a JSON object with name, scorer and items")
    if unknown := sorted(set(raw) - set(FIELDS)):
        raise InvalidRequest(f"task: unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    name, scorer = raw.get("name"), raw.get("scorer")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidRequest(f"task name must match {NAME.pattern}, got {name!r}")
    if scorer not in SCORER_NAMES:
        raise InvalidRequest(f"task scorer must be one of {', '.join(SCORER_NAMES)}")
    max_tokens = raw.get("max_tokens", 256)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise InvalidRequest("task max_tokens must be a whole number above 0")
    choices = _texts(raw.get("choices", []), "choices", MAX_CHOICES)
    if bool(choices) != (scorer == "choice"):
        raise InvalidRequest("task choices belong to the scorer `choice`, which needs them")
    raw_items = raw.get("items")
    if not isinstance(raw_items, list) or not 1 <= len(raw_items) <= MAX_ITEMS:
        raise InvalidRequest(f"task items must be a list of 1 to {MAX_ITEMS} items")
    items = tuple(
        _parse_item(item, f"items[{i}]", scorer, choices) for i, item in enumerate(raw_items)
    )
    stop = _texts(raw.get("stop", []), "stop", MAX_STOPS)
    return EvaluationTask(name, scorer, items, max_tokens, stop, choices)


def _parse_item(
    raw: object, where: str, scorer: ScorerName, choices: tuple[str, ...]
) -> EvaluationItem:
    if not isinstance(raw, Mapping) or not {"answer"} < set(raw) <= {
        "prompt",
        "messages",
        "answer",
    }:
        raise InvalidRequest(f"task {where} must have an answer and either prompt or messages")
    if len(raw) != 2:
        raise InvalidRequest(f"task {where} must have prompt or messages, not both")
    answer = _answer(raw["answer"], where)
    _check_answer(answer, where, scorer, choices)
    if "messages" in raw:
        return EvaluationItem(_messages(raw["messages"], where), answer)
    if not isinstance(raw["prompt"], str) or not raw["prompt"]:
        raise InvalidRequest(f"task {where}.prompt must be a text that is not empty")
    return EvaluationItem(_unicode(raw["prompt"], f"{where}.prompt"), answer)


def _answer(value: object, where: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"task {where}.answer must be finite")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return format(Decimal(str(value)), "f")
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"task {where}.answer must be a text or a number")
    return _unicode(value, f"{where}.answer")


def _check_answer(answer: str, where: str, scorer: ScorerName, choices: tuple[str, ...]) -> None:
    if scorer == "number" and last_number(answer) is None:
        raise InvalidRequest(f"task {where}.answer must hold a number for the scorer `number`")
    if scorer == "choice" and answer not in choices:
        raise InvalidRequest(f"task {where}.answer must be one of the task's choices")
    if scorer == "regex":
        check_pattern(answer)


def _messages(raw: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(raw, list) or not raw:
        raise InvalidRequest(f"task {where}.messages must be a list of messages")
    messages = []
    for message in raw:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidRequest(f"task {where}.messages: each has exactly role and content")
        role, content = message["role"], message["content"]
        if role not in ROLES or not isinstance(content, str):
            raise InvalidRequest(
                f"task {where}.messages: role is one of {', '.join(ROLES)}, content is a text"
            )
        messages.append((str(role), _unicode(content, f"{where}.messages")))
    return tuple(messages)


def _texts(raw: object, field: str, limit: int) -> tuple[str, ...]:
    if not isinstance(raw, list) or len(raw) > limit:
        raise InvalidRequest(f"task {field} must be a list of at most {limit} texts")
    if not all(isinstance(text, str) and text for text in raw):
        raise InvalidRequest(f"task {field} must hold texts that are not empty")
    return tuple(_unicode(text, field) for text in raw)


def _unicode(text: str, where: str) -> str:
    """`text`, which UTF-8 can hold: every answer that shows the task needs that."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"task {where} holds a lone surrogate; send valid Unicode") from None
    return text


def _encode_item(item: EvaluationItem) -> dict[str, Any]:
    if isinstance(item.prompt, str):
        return {"prompt": item.prompt, "answer": item.answer}
    messages = [{"role": role, "content": content} for role, content in item.prompt]
    return {"messages": messages, "answer": item.answer}
