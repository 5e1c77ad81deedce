"""What was asked about a prompt's tokens, put together from the chunks in which it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from openmint.engine.plan import PromptScored
from openmint.scheduler.work import SampleWork
from openmint.types import FloatArray, TopLogprobs


def prompt_scores(work: SampleWork, scored: Sequence[PromptScored]) -> dict[str, Any]:
    """The fields of a SampleResult that the work asked for, the others None."""
    tops = [part.top for part in scored if part.top is not None]
    candidates = [part.candidates_NK for part in scored if part.candidates_NK is not None]
    drawn = [part.alternatives for part in scored if part.alternatives is not None]
    wanted = work.target_prompt_logprobs_NK
    logprobs_T = _after_nan([part.logprobs_N for part in scored])
    return {
        "prompt_logprobs_T": logprobs_T if work.prompt_logprobs else None,
        "topk_prompt_logprobs": _after_empty(_joined(tops, work.topk_prompt_logprobs)),
        "target_prompt_logprobs_NK": None if wanted is None else _rows(candidates, wanted.shape[1]),
        "prompt_alternatives": _joined(drawn, work.prompt_alternatives),
    }


def _after_nan(parts: list[FloatArray]) -> FloatArray:
    return np.concatenate([np.array([np.nan], dtype=np.float32), *parts]).astype(np.float32)


def _rows(parts: list[FloatArray], width: int) -> FloatArray:
    """Consecutive rows as one array; a prompt of one token has none."""
    return np.concatenate([np.zeros((0, width), dtype=np.float32), *parts])


def _joined(parts: list[TopLogprobs], k: int) -> TopLogprobs | None:
    """Rows for the prompt's tokens after the first."""
    if not k:
        return None
    ids = [np.zeros((0, k), dtype=np.int64), *(part.token_ids_NK for part in parts)]
    return TopLogprobs(np.concatenate(ids), _rows([part.logprobs_NK for part in parts], k))


def _after_empty(rows: TopLogprobs | None) -> TopLogprobs | None:
    """Row 0 is empty: nothing predicts the first token."""
    if rows is None:
        return None
    ids_NK = np.pad(rows.token_ids_NK, ((1, 0), (0, 0)))
    return TopLogprobs(ids_NK, np.pad(rows.logprobs_NK, ((1, 0), (0, 0)), constant_values=-np.inf))
