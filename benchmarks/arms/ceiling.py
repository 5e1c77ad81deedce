"""How fast could it be? The matrix products that the work needs, run bare in a loop.

Nothing else happens: no norm, no softmax, no loss, no sampling, no cache. Weights have the base's
shapes, random values and memory of their own for each layer. Each product is computed in the way
that is fastest here: plain, by a transposed copy, or by oneDNN's packed weights, over all rows at
once or chunk by chunk. Inputs stay where the cache has them, so no real step can do better.

Shapes: T rows, I in, O out; S sequences of L tokens, H heads that share G key heads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arms.protocol import Turn, serve

Product = Callable[[], None]
CHUNKS = (128, 256)
"""Besides all rows at once."""
TRIALS = 4


@dataclass(frozen=True)
class Shapes:
    """What of a base's config decides its products."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, base: str) -> Shapes:
        config = json.loads((Path(base) / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
        )

    @property
    def parts(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Each fused linear layer of a block: its inputs, and the outputs of its targets."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv)),
            "out": (q, (self.hidden,)),
            "gate_up": (self.hidden, (self.inner, self.inner)),
            "down": (self.inner, (self.hidden,)),
        }


Multiply = Callable[[Tensor], object]
"""Computes `x_TI @ weight.T`."""


def plain(rows: int, weight_OI: Tensor) -> Multiply:
    return lambda x_TI: F.linear(x_TI, weight_OI)


def transposed(rows: int, weight_OI: Tensor) -> Multiply:
    weight_IO = weight_OI.t().contiguous()
    return lambda x_TI: x_TI @ weight_IO


def packed(rows: int, weight_OI: Tensor) -> Multiply:
    return partial(in_packed, torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows))


WAYS: dict[str, Callable[[int, Tensor], Multiply]] = {
    "plain": plain,
    "transposed": transposed,
    "packed": packed,
}


def in_packed(packed_weight: Tensor, x_TI: Tensor) -> object:
    """The op that `openmint/layers/linear.py` takes for few rows."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, packed_weight, None, "none", [], "")


def fastest(
    name: str, rows: int, weights: Sequence[Tensor], chosen: dict[str, str]
) -> list[Product]:
    """One product per weight, all in the way that is fastest over all of them together."""
    x_TI = torch.randn(rows, weights[0].shape[1]).bfloat16()
    candidates: dict[str, list[Product]] = {}
    for way, prepare in WAYS.items():
        own = [prepare(rows, weight) for weight in weights]
        for chunk in {rows, *(chunk for chunk in CHUNKS if chunk < rows)}:
            label = f"{way}, {chunk} rows at once"
            candidates[label] = [in_chunks(multiply, x_TI, chunk) for multiply in own]
    least = dict.fromkeys(candidates, float("inf"))
    for _ in range(TRIALS):  # in turn: what disturbs one pass disturbs one candidate once
        for label, products in candidates.items():
            least[label] = min(least[label], seconds_of(products))
    chosen[name] = min(least, key=least.__getitem__)
    return candidates[chosen[name]]


def in_chunks(multiply: Multiply, x_TI: Tensor, chunk: int) -> Product:
    parts = torch.split(x_TI, chunk)

    def product() -> None:
        for part in parts:
            multiply(part)

    return product


def seconds_of(products: Sequence[Product]) -> float:
    """One pass over all of them, from memory: in a step other weights come in between."""
    others().fill_(1)
    started_at = time.perf_counter()
    for product in products:
        product()
    return time.perf_counter() - started_at


@cache
def others() -> Tensor:
    """More bytes than any cache here holds."""
    return torch.ones(2**27, dtype=torch.uint8)


def random_weights(count: int, num_out: int, num_in: int) -> list[Tensor]:
    return [torch.randn(num_out, num_in).mul_(0.02).bfloat16() for _ in range(count)]


class TrainingCeiling:
    """Forward products and input gradients of a training step, a micro-batch at a time.

    With several `lanes` the rows of a micro-batch are shared out among as many threads, each of
    which computes alone; else all cores share each product. With `extras` the products of attention
    and of the adapters (rank 8) come on top.
    """

    def __init__(
        self,
        base: str,
        sequences: int,
        length: int,
        micro_batch_tokens: int,
        unembed: bool = False,
        extras: bool = False,
        lanes: int = 1,
    ) -> None:
        threads = int(os.environ["OMP_NUM_THREADS"]) // lanes
        torch.set_num_threads(threads)
        self._pool = ThreadPoolExecutor(
            lanes, initializer=torch.set_num_threads, initargs=(threads,)
        )
        shapes, self._lanes = Shapes.of(base), lanes
        each = max(1, micro_batch_tokens // length)
        assert each % lanes == 0, f"{each} sequences can't be shared out among {lanes} lanes"
        rows, self._tokens = each * length // lanes, sequences * length
        self._num_micro_batches = -(-sequences // each)
        linear, self.chosen = training_products(shapes, rows, threads)
        self._products = list(linear)
        if extras:
            self._products += attention_products(shapes, each // lanes, length)
            self._products += adapter_products(shapes, rows, rank=8, unembed=unembed)

    def __call__(self, lap: int) -> dict[str, Any]:
        started_at = time.perf_counter()
        for _ in range(self._num_micro_batches):
            list(self._pool.map(run_all, [self._products] * self._lanes))
        seconds = time.perf_counter() - started_at
        return {"seconds": seconds, "tokens": self._tokens, "ways": self.chosen}


@torch.inference_mode()
def run_all(products: Sequence[Product]) -> None:
    for product in products:
        product()


@cache
def training_products(
    shapes: Shapes, rows: int, threads: int
) -> tuple[list[Product], dict[str, str]]:
    """Forward and input gradient of every linear layer, in a step's order, and how each is done.

    The first block's q, k, v need no input gradient: nothing below them is trained. Ways are chosen
    for as many `threads` as torch has now.
    """
    chosen: dict[str, str] = {}
    forward, backward = [], []
    for name, (num_in, outs) in shapes.parts.items():
        weights = random_weights(shapes.layers, sum(outs), num_in)
        forward.append(fastest(name, rows, weights, chosen))
        gradients = fastest(f"{name}, gradient", rows, turned(weights), chosen)
        backward.append(gradients[1:] if name == "qkv" else gradients)
    head = random_weights(1, shapes.vocab, shapes.hidden)
    products = [layer[i] for i in range(shapes.layers) for layer in forward]
    products += fastest("lm_head", rows, head, chosen)
    products += fastest("lm_head, gradient", rows, turned(head), chosen)
    for i in range(1, shapes.layers + 1):
        products += [layer[-i] for layer in reversed(backward) if i <= len(layer)]
    return products, chosen


def turned(weights: Sequence[Tensor]) -> list[Tensor]:
    """An input gradient is the product with the weight the other way round."""
    return [weight.t().contiguous() for weight in weights]


def attention_products(shapes: Shapes, sequences: int, length: int) -> list[Product]:
    """Scores and values forward, their four gradients, for each layer."""
    shared = shapes.heads // shapes.kv_heads
    q = torch.randn(sequences, shapes.kv_heads, shared * length, shapes.head_dim).bfloat16()
    k = torch.randn(sequences, shapes.kv_heads, length, shapes.head_dim).bfloat16()
    scores = q @ k.transpose(2, 3)
    layer: list[Product] = [
        lambda: void(q @ k.transpose(2, 3)),
        lambda: void(scores @ k),
        lambda: void(q @ k.transpose(2, 3)),  # gradient of the probabilities
        lambda: void(scores.transpose(2, 3) @ q),  # of the values
        lambda: void(scores @ k),  # of the queries
        lambda: void(scores.transpose(2, 3) @ q),  # of the keys
    ]
    return layer * shapes.layers


def adapter_products(shapes: Shapes, rows: int, rank: int, unembed: bool) -> list[Product]:
    """Two products forward and four backward for each target of each layer."""
    layer = [
        product
        for num_in, outs in shapes.parts.values()
        for num_out in outs
        for product in lora_products(rows, num_in, num_out, rank)
    ]
    head = lora_products(rows, shapes.hidden, shapes.vocab, rank) if unembed else []
    return layer * shapes.layers + head


def lora_products(rows: int, num_in: int, num_out: int, rank: int) -> list[Product]:
    x_TI, y_TO = torch.randn(rows, num_in).bfloat16(), torch.randn(rows, num_out).bfloat16()
    a_RI, b_RO = torch.randn(rank, num_in).bfloat16(), torch.randn(rank, num_out).bfloat16()
    h_TR = torch.randn(rows, rank).bfloat16()
    return [
        lambda: void(F.linear(x_TI, a_RI)),
        lambda: void(torch.addmm(y_TO, h_TR, b_RO)),
        lambda: void(F.linear(y_TO, b_RO)),
        lambda: void(torch.addmm(x_TI, h_TR, a_RI)),
        lambda: void(h_TR.t() @ x_TI),
        lambda: void(h_TR.t() @ y_TO),
    ]


def void(_: Tensor) -> None:
    """Drops a result."""


class DecodeCeiling:
    """All linear layers and the output layer of `steps` decode steps of `sequences` rows."""

    def __init__(self, base: str, sequences: int, steps: int, rounds: int) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        shapes, self.chosen = Shapes.of(base), dict[str, str]()
        self._sequences, self._steps = sequences, steps * rounds
        blocks = [
            fastest(
                name,
                sequences,
                random_weights(shapes.layers, sum(outs), num_in),
                self.chosen,
            )
            for name, (num_in, outs) in shapes.parts.items()
        ]
        head = random_weights(1, shapes.vocab, shapes.hidden)
        self._products = [block[i] for i in range(shapes.layers) for block in blocks]
        self._products += fastest("lm_head", sequences, head, self.chosen)

    def __call__(self, lap: int) -> dict[str, Any]:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        started_at = time.perf_counter()
        for _ in range(self._steps):
            run_all(self._products)
        seconds = time.perf_counter() - started_at
        return {
            "seconds": seconds,
            "tokens": self._steps * self._sequences,
            "ways": self.chosen,
        }


KINDS: dict[str, Callable[..., Turn]] = {"train": TrainingCeiling, "decode": DecodeCeiling}

if __name__ == "__main__":
    serve(KINDS, packages=("torch",))
