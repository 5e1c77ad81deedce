"""Writes the reference pages that come from the code: settings and commands.

`make docs` runs it; a test compares its output with what is committed.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer.main

from openmint import config
from openmint.cli.main import app

FOLDER = Path(__file__).resolve().parent

SETTINGS_HEAD = """# Settings

Made from `openmint/config.py` by `make docs`; don't edit by hand.

A setting is looked up in this order, the first that says something wins: command-line flag,
environment variable, settings file (`openmint serve --config FILE`, TOML), default. An unknown key
in the file is refused. `openmint serve` reads settings once, at its start.

```toml
port = 8411
bases = ["HuggingFaceTB/SmolLM2-135M-Instruct"]

[worker]
threads = 2

[service]
long_poll_seconds = 20
```
"""

SETTINGS_TAIL = """
## Environment only
| variable | meaning |
|---|---|
| `OPENMINT_LOG_FORMAT` | `json` or `console`; otherwise console on a terminal, JSON elsewhere. |
| `OPENMINT_LOG_LEVEL` | `debug`, `info` (default), `warning` or `error`. |
| `OPENMINT_URL` | Server that the remote commands talk to; default `http://127.0.0.1:8411`. |
| `OPENMINT_API_KEY` | Key of the remote commands; `TINKER_API_KEY` is taken too. |
"""

COMMANDS_HEAD = """# Commands

Made from the command line's own help by `make docs`; don't edit by hand.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 not found, 4 conflict. `--json` prints one
JSON document on stdout. Tables become tab-separated lines without a head when piped. Commands that
change what is served ask first; `--yes` answers for scripts. Errors go to stderr.

Remote commands (all but `serve`, `keys`, `doctor`, `plan` and `tokenizer`) talk to `--url` with
`--key`, or with the key in `DATA/admin.key`.
"""


def settings_page() -> str:
    sections = (
        ("Top level", config.Settings, "OPENMINT_"),
        ("`[worker]`", config.WorkerConfig, "OPENMINT_WORKER_"),
        ("`[service]`", config.ServiceConfig, "OPENMINT_SERVICE_"),
    )
    parts = [SETTINGS_HEAD]
    for title, section, prefix in sections:
        parts.append(
            f"\n## {title}\n| key | default | environment | meaning |\n|---|---|---|---|\n"
        )
        parts.extend(_setting_rows(section, prefix))
    return "".join([*parts, SETTINGS_TAIL])


def _setting_rows(section: type[Any], prefix: str) -> Iterator[str]:
    texts = _field_texts(section)
    default = section()
    for field in fields(section):
        value = getattr(default, field.name)
        if field.name not in texts:
            continue  # a nested section, which has a table of its own
        shown = ",".join(value) if isinstance(value, tuple) else str(value)
        cells = (f"`{field.name}`", f"`{shown}`" if shown else "empty")
        variable = f"`{prefix}{field.name.upper()}`"
        yield f"| {' | '.join((*cells, variable, texts[field.name]))} |\n"


def _field_texts(section: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def commands_page() -> str:
    return COMMANDS_HEAD + "".join(_command_parts(typer.main.get_command(app), "openmint"))


def _command_parts(command: Any, name: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is not None:
        for child in sorted(children):
            yield from _command_parts(children[child], f"{name} {child}")
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, *(_argument(p) for p in arguments), "[OPTIONS]"])
    yield f"\n## `{usage}`\n{' '.join((command.help or '').split())}\n"
    options = [p for p in command.params if p.param_type_name == "option"]
    for parameter in [*arguments, *options]:
        label = ", ".join(parameter.opts) if parameter in options else _argument(parameter)
        text = " ".join((getattr(parameter, "help", "") or "").split())
        yield f"- `{label}`{_default(parameter)}{': ' + text if text else ''}\n"


def _argument(parameter: Any) -> str:
    label = parameter.metavar or parameter.name.upper()
    label = label if parameter.metavar else label.strip("[]")
    return label if parameter.required else f"[{label}]"


def _default(parameter: Any) -> str:
    value = parameter.default
    hidden = value in (None, "", False) or callable(value) or parameter.required
    return "" if hidden else f" (default `{value}`)"


PAGES = {"configuration.md": settings_page, "cli.md": commands_page}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
