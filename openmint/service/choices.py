"""From generated tokens to the text that a client sees: whole characters, nothing past a stop.

Pure; one ChoiceText per generated sequence, owned by whoever feeds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from openmint.service.tokenizers import TextDecoder, Tokenizer
from openmint.types import TopLogprobs
from openmint.wire.openai import Choice, TokenText


class ChoiceText:
    """Turns tokens into deltas that never break a character nor show any part of a stop string."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, stops: tuple[str, ...], eos_ids: frozenset[int]
    ) -> None:
        self.num_tokens = 0
        self._index = index
        self._tokenizer = tokenizer
        self._stops = stops
        self._eos_ids = eos_ids
        self._decoder = TextDecoder(tokenizer)
        self._text = ""
        self._num_shown = 0
        self._stopped_at: int | None = None
        self._pending: deque[tuple[int, TokenText]] = deque()
        """Tokens whose text is not shown yet, each with where in the text it begins."""

    def feed(
        self, tokens: Sequence[int], logprobs: Sequence[float], top: TopLogprobs | None
    ) -> Choice | None:
        """What became safe to show; None when nothing did."""
        for i, token in enumerate(tokens):
            self.num_tokens += 1
            if self._stopped_at is None:
                self._add(token, float(logprobs[i]), top, i)
        if self._stopped_at is not None:
            return self._show(self._stopped_at)
        return self._show(len(self._text) - self._num_held())

    def finish(self, stop_reason: str) -> Choice:
        """The rest, with the finish reason. An unfinished last character is dropped."""
        end = len(self._text) if self._stopped_at is None else self._stopped_at
        reason = stop_reason if self._stopped_at is None else "stop"
        rest = self._show(end)
        while self._stopped_at is None and self._pending:
            self._pending.popleft()
        if rest is None:
            return Choice(self._index, "", finish_reason=reason, text_offset=end)
        return Choice(self._index, rest.text, rest.tokens, reason, text_offset=rest.text_offset)

    def _add(self, token: int, logprob: float, top: TopLogprobs | None, row: int) -> None:
        start = len(self._text)
        self._text += self._decoder.feed(token)
        if token not in self._eos_ids and token not in self._tokenizer.special_ids:
            self._pending.append((start, self._token_text(token, logprob, top, row)))
        searched = max(0, start - max(map(len, self._stops), default=1) + 1)
        found = [at for stop in self._stops if (at := self._text.find(stop, searched)) >= 0]
        if found:
            self._stopped_at = min(found)

    def _num_held(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._text))
        for size in range(longest, 0, -1):
            tail = self._text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0

    def _show(self, end: int) -> Choice | None:
        text, offset = self._text[self._num_shown : end], self._num_shown
        tokens = []
        while self._pending and self._pending[0][0] < end:
            tokens.append(self._pending.popleft()[1])
        self._num_shown = max(end, self._num_shown)
        if not text and not tokens:
            return None
        return Choice(self._index, text, tuple(tokens), text_offset=offset)

    def _token_text(
        self, token: int, logprob: float, top: TopLogprobs | None, row: int
    ) -> TokenText:
        raw = self._tokenizer.token_bytes(token)
        return TokenText(_display(raw), raw, logprob, self._alternatives(top, row))

    def _alternatives(
        self, top: TopLogprobs | None, row: int
    ) -> tuple[tuple[str, bytes, float], ...]:
        if top is None:
            return ()
        filled = np.isfinite(top.logprobs_NK[row])
        pairs = zip(top.token_ids_NK[row][filled], top.logprobs_NK[row][filled], strict=True)
        raws = [(self._tokenizer.token_bytes(int(token)), float(lp)) for token, lp in pairs]
        return tuple((_display(raw), raw, logprob) for raw, logprob in raws)


def _display(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
