"""What does the usual way of training an adapter do in a turn? `transformers` and `peft` in bf16.

Base and adapter are both bf16, which spares peft the casts of its fp32 default. Runs in the
environment of the rival `peft`.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.arms.protocol import serve
from benchmarks.arms.steps import StepLog, decode_answer, prompts, token_rows

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Training:
    """Forward and backward of one step in forwards of `per_forward` sequences, then AdamW."""

    def __init__(
        self,
        base: str,
        sequences: int,
        length: int,
        per_forward: int,
        unembed: bool = False,
        experts: bool = False,
    ) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        modules = [*MODULES, *(["lm_head"] if unembed else [])]
        config = LoraConfig(
            r=8,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules=modules[:4] if experts else modules,
            target_parameters=list(EXPERTS) if experts else None,
        )
        with warnings.catch_warnings():
            # Tied weights matter when an adapter is merged; here lm_head only runs.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            self._model = get_peft_model(model, config, autocast_adapter_dtype=False)
        self._model.train()
        trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), fused=True)
        rows = torch.from_numpy(token_rows(sequences, length + 1, seed=0))
        self._batches = torch.split(rows, per_forward)
        self._tokens = sequences * length

    def __call__(self, lap: int) -> dict[str, Any]:
        started_at = time.perf_counter()
        losses = [self._accumulate(rows) for rows in self._batches]
        trained_at = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {
            "seconds": trained_at - started_at,
            "tokens": self._tokens,
            "loss_per_token": sum(losses) / self._tokens,
            "optimizer_ms": 1000 * (time.perf_counter() - trained_at),
        }

    def _accumulate(self, rows: Tensor) -> float:
        """Add the gradient of these sequences; their loss."""
        logits = self._model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")
        loss.backward()
        return float(loss.detach())


class Decoding:
    """Prompts at once, then greedy steps of all sequences over the model's own cache."""

    def __init__(self, base: str, sequences: int, tokens_in: int, tokens_out: int) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        self._shape, self._tokens_out = (sequences, tokens_in), tokens_out

    @torch.inference_mode()
    def __call__(self, lap: int) -> dict[str, Any]:
        rows, log = torch.from_numpy(prompts(*self._shape, lap, 0)), StepLog(self._shape[0])
        cache, first = None, []
        for _ in range(self._tokens_out):
            answer = self._model(input_ids=rows, past_key_values=cache, use_cache=True)
            cache, rows = answer.past_key_values, answer.logits[:, -1:].argmax(-1)
            first = first or rows[:, 0].tolist()
            log.step(self._shape[0])
        return decode_answer([log], first)


if __name__ == "__main__":
    serve({"train": Training, "decode": Decoding}, packages=("torch", "transformers", "peft"))
