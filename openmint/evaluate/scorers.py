"""Scorers: whether one completion answers one item. Pure functions of text.

| scorer   | right when                                                                      |
|----------|---------------------------------------------------------------------------------|
| exact    | the completion equals the answer, surrounding white space aside                 |
| contains | the answer occurs in the completion, in any case                                |
| number   | the last number in the completion equals the answer: 1,200 = 1200.0             |
| choice   | the last of the task's choices that stands alone in the completion is the answer |
| regex    | the item's answer, a pattern of `patterns`, occurs in the completion            |
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal, get_args

from openmint.evaluate.patterns import matches

ScorerName = Literal["exact", "contains", "number", "choice", "regex"]
SCORER_NAMES: tuple[ScorerName, ...] = get_args(ScorerName)

NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
MAX_NUMBER_CHARS = 64


def is_right(scorer: ScorerName, completion: str, answer: str, choices: tuple[str, ...]) -> bool:
    """Whether `completion` is right by `scorer`; `choices` matter to `choice` alone."""
    if scorer == "exact":
        return completion.strip() == answer.strip()
    if scorer == "contains":
        return answer.casefold() in completion.casefold()
    if scorer == "number":
        found = last_number(completion)
        return found is not None and found == last_number(answer)
    if scorer == "choice":
        return last_choice(completion, choices) == answer
    return matches(answer, completion)


def last_number(text: str) -> Decimal | None:
    """The last number written in `text`, thousands separators understood; None without one."""
    numbers = [found[0] for found in NUMBER.finditer(text)]
    if not numbers or len(numbers[-1]) > MAX_NUMBER_CHARS:
        return None
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-"))


def last_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The choice that stands alone latest in `text`; of two that end together, the longer."""
    best: tuple[int, int, str] | None = None
    for choice in choices:
        for found in re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", text):
            here = (found.end(), len(choice), choice)
            best = here if best is None else max(best, here)
    return best[2] if best else None
