"""`openmint chat`: talk to a base or a policy, one question or a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from openmint.cli.output import err_console
from openmint.cli.remote import Remote, check, with_remote
from openmint.errors import ServiceError

Message = dict[str, str]


def register(app: typer.Typer) -> None:
    app.command()(chat)


@with_remote
def chat(
    remote: Remote,
    model: Annotated[
        str, typer.Argument(help="A base, tenant/policy, …@alias, …@sha256:…, or tinker:// path.")
    ],
    message: Annotated[
        str | None, typer.Argument(help="One question; without it a conversation begins.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Repeat an answer.")] = None,
) -> None:
    """Ask a model; the answer appears as it is generated. End a conversation with Ctrl-D."""
    settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    body = {name: value for name, value in settings.items() if value is not None}
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    for question in [message] if message is not None else _questions():
        history.append({"role": "user", "content": question})
        answer = _answer(remote, {**body, "messages": history})
        history.append({"role": "assistant", "content": answer})


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if question.strip():
            yield question


def _answer(remote: Remote, body: dict[str, Any]) -> str:
    """The whole answer, printed piece by piece; what ran is said on stderr."""
    pieces: list[str] = []
    request = {**body, "stream": True}
    with remote.client.stream("POST", "/v1/chat/completions", json=request) as response:
        check(response)
        for piece in _pieces(response.iter_lines()):
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    if err_console.is_terminal:
        revision = response.headers.get("x-openmint-revision", "")
        err_console.print(f"[dim]{revision}[/dim]")
    return "".join(pieces)


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """The text of each server-sent event. Raises ServiceError for an error inside the stream."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if error := event.get("error"):
            raise ServiceError(str(error.get("message", error)))
        for choice in event["choices"]:
            if content := choice["delta"].get("content"):
                yield content
