"""How does an arm in a process of its own hear its turn? JSON lines in, JSON lines out.

`{"do": "prepare", "arm": name, "kind": ..., "settings": {...}}` makes an arm and answers with
versions; `{"do": "run", "arm": name, "lap": n}` lets it work once and answers with seconds,
tokens and facts. Between turns the process sleeps on its standard input. Standard library only:
this file also runs in the environments of rivals.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Turn = Callable[[int], dict[str, Any]]
"""`turn(lap)` works once; its answer has `seconds`, `tokens` and whatever else it noticed."""


def serve(kinds: Mapping[str, Callable[..., Turn]], packages: tuple[str, ...]) -> None:
    """Answer requests until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    arms: dict[str, Turn] = {}
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), kinds, arms, packages)
        except Exception as error:  # the process's edge: the house must hear why
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(
    request: dict[str, Any],
    kinds: Mapping[str, Callable[..., Turn]],
    arms: dict[str, Turn],
    packages: tuple[str, ...],
) -> dict[str, Any]:
    if request["do"] == "prepare":
        arms[request["arm"]] = kinds[request["kind"]](**request["settings"])
        return {"versions": versions(packages)}
    cpu_before = time.process_time()
    answer = arms[request["arm"]](request["lap"])
    return {**answer, "cpu_seconds": time.process_time() - cpu_before}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
