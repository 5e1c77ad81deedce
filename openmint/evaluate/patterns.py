"""The subset of regular expressions that a task may use: none that can eat a server.

A pattern comes from a client. Nested repeats take exponential time to match and, with counts,
unbounded memory to compile, so they are refused before any compiler sees them; what remains runs
under a time limit.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import regex

from openmint.errors import InvalidRequest

MAX_PATTERN_CHARS = 256
MAX_REPEAT_COUNT = 1000
MATCH_SECONDS = 0.25

COUNTED = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")
ESCAPES = set("dDwWsSbBnrt") | set(r"\.^$*+?{}[]|()-/'\"!@#%&=:;,<>~` ")


def check_pattern(pattern: str) -> None:
    """Nothing when `pattern` is in the subset. Raises InvalidRequest that names what isn't."""
    if not 0 < len(pattern) <= MAX_PATTERN_CHARS:
        raise InvalidRequest(f"a pattern has 1 to {MAX_PATTERN_CHARS} characters")
    _scan(pattern)
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise InvalidRequest(f"pattern {pattern!r} is not valid: {error}") from None


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` occurs in `text`; a match that takes too long counts as none."""
    try:
        found = _compiled(pattern).search(text, timeout=MATCH_SECONDS, concurrent=True)
    except TimeoutError:
        return False
    return found is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def _scan(pattern: str) -> None:
    """Walk the pattern once; `repeats` says for each open group whether it holds a repeat."""
    repeats = [False]
    at = 0
    while at < len(pattern):
        char = pattern[at]
        group_repeats = False
        if char == "\\":
            at = _skip_escape(pattern, at)
        elif char == "[":
            at = _skip_class(pattern, at)
        elif char == "(":
            at = _skip_group_start(pattern, at)
            repeats.append(False)
            continue
        elif char in "*+?{":
            raise InvalidRequest(f"pattern: nothing to repeat at character {at}; escape it with \\")
        elif char == ")":
            if len(repeats) == 1:
                raise InvalidRequest(f"pattern: unmatched ) at character {at}")
            group_repeats = repeats.pop()
            repeats[-1] |= group_repeats
            at += 1
        else:
            at += 1
        after = _skip_repeat(pattern, at)
        if after > at:
            if group_repeats:
                raise InvalidRequest(
                    f"pattern: a repeat inside a repeated group (character {at}) is not allowed"
                )
            repeats[-1] = True
        at = after


def _skip_escape(pattern: str, at: int) -> int:
    escaped = pattern[at + 1 : at + 2]
    if escaped not in ESCAPES or not escaped:
        raise InvalidRequest(
            f"pattern: escape \\{escaped} is not allowed; use \\d \\w \\s \\b or punctuation"
        )
    return at + 2


def _skip_class(pattern: str, at: int) -> int:
    at += 1
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"
    while at < len(pattern) and pattern[at] != "]":
        if pattern[at] == "[":
            raise InvalidRequest("pattern: [ inside a character class must be written \\[")
        at = _skip_escape(pattern, at) if pattern[at] == "\\" else at + 1
    if at >= len(pattern):
        raise InvalidRequest("pattern: a character class is not closed")
    return at + 1


def _skip_group_start(pattern: str, at: int) -> int:
    if pattern.startswith("(?:", at):
        return at + 3
    if pattern.startswith("(?", at) or pattern.startswith("(*", at):
        raise InvalidRequest("pattern: only ( and (?: groups are allowed")
    return at + 1


def _skip_repeat(pattern: str, at: int) -> int:
    """Where the repeat that starts at `at` ends; `at` itself when none starts there."""
    char = pattern[at : at + 1]
    if char == "{":
        found = COUNTED.match(pattern, at)
        if not found:
            raise InvalidRequest("pattern: { starts a count such as {2,5}; write \\{ for the sign")
        if any(int(count) > MAX_REPEAT_COUNT for count in found.groups() if count):
            raise InvalidRequest(f"pattern: a count is at most {MAX_REPEAT_COUNT}")
        at = found.end()
    elif char and char in "*+?":
        at += 1
    else:
        return at
    if pattern[at : at + 1] in ("?", "+"):
        at += 1
    if pattern[at : at + 1] and pattern[at] in "*+?{":
        raise InvalidRequest(f"pattern: two repeats in a row at character {at}")
    return at
