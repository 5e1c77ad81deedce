"""What does vLLM do in a turn? Its CPU build, many LoRA adapters in one batch.

The engine runs in this process and is stepped by hand, so that its steps can be timed. Runs in the
environment of the rival `vllm`.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest

from benchmarks.arms.protocol import serve
from benchmarks.arms.steps import StepLog, decode_answer, prompts


class Decoding:
    """`sequences` new prompts at once, greedy; sequence i on the i-th of `adapters` (folders)."""

    def __init__(
        self, base: str, sequences: int, tokens_in: int, tokens_out: int, adapters: list[str]
    ) -> None:
        self._sequences, self._tokens_in = sequences, tokens_in
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=base,
                dtype="bfloat16",
                max_model_len=2 * (tokens_in + tokens_out),
                max_num_seqs=sequences,
                enable_lora=True,
                max_loras=len(adapters),
                max_lora_rank=8,
                enable_prefix_caching=False,
                disable_log_stats=True,
            )
        )
        self._adapters = [
            LoRARequest(Path(folder).name, i + 1, folder) for i, folder in enumerate(adapters)
        ]
        self._params = SamplingParams(
            temperature=0.0, max_tokens=tokens_out, ignore_eos=True, detokenize=False
        )
        self._request_ids = itertools.count()

    def __call__(self, lap: int) -> dict[str, Any]:
        rows = prompts(self._sequences, self._tokens_in, lap, 0)
        lengths: dict[str, int] = {}
        first: dict[str, int] = {}
        log = StepLog(self._sequences)
        for row, adapter in zip(rows, self._adapters, strict=True):
            request_id = str(next(self._request_ids))
            prompt = {"prompt_token_ids": row.tolist()}
            self._engine.add_request(request_id, prompt, self._params, lora_request=adapter)
            lengths[request_id] = 0
        num_drawn = 0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens = output.outputs[0].token_ids
                if tokens:
                    lengths[output.request_id] = len(tokens)
                    first.setdefault(output.request_id, int(tokens[0]))
            log.step(sum(lengths.values()) - num_drawn)
            num_drawn = sum(lengths.values())
        return decode_answer([log], [first[request_id] for request_id in lengths])


if __name__ == "__main__":
    serve({"decode": Decoding}, packages=("vllm-cpu", "torch", "transformers", "numpy"))
