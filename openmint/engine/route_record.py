"""What the tokens of a sequence chose on their way through a model, kept and encoded.

Shapes: T tokens of a batch, N tokens of a sequence, L layers with experts, K experts of a token,
I indexers, C chosen keys of a query, S places in the page cache.

Sampling keeps choices beside keys and values, in the same pages, so what a shared prefix chose is
there for all who share it. A record takes L * K bytes per token (two each above 256 experts). What
indexers chose is a set of earlier positions that changes little from token to token, so the
difference of neighbours is packed as bits and compressed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.layers.sparse import NONE
from openmint.models.model import RouteShape
from openmint.types import AnyArray, IntArray

HEAD = struct.Struct("<4sIIIII")
MAGIC = b"rt01"
LEVEL = 3


class Recorder:
    """Keeps the choices of one batch; stands where `layers.routes.Routes` does."""

    def __init__(self) -> None:
        self._experts: list[Tensor] = []
        self._keys: list[Tensor | None] = []

    def experts(self, layer: int, own_TK: Tensor) -> Tensor:
        assert layer == len(self._experts), "layers come in order, each once"
        self._experts.append(own_TK)
        return own_TK

    def keys(self, layer: int, own_TC: Tensor | None) -> Tensor | None:
        assert layer == len(self._keys), "layers come in order, each once"
        self._keys.append(own_TC)
        return own_TC

    @property
    def taken_experts(self) -> AnyArray | None:
        """`[T, L, K]`; None where no layer has experts."""
        return torch.stack(self._experts, dim=1).cpu().numpy() if self._experts else None

    @property
    def taken_keys(self) -> AnyArray | None:
        """`[T, I, C]`; None when every token saw all keys up to its own."""
        chosen = [own_TC for own_TC in self._keys if own_TC is not None]
        return torch.stack(chosen, dim=1).cpu().numpy() if chosen else None


class RouteCache:
    """The choices of all tokens in the page cache. Memory is taken where it is written to."""

    def __init__(self, shape: RouteShape, num_places: int) -> None:
        self._shape = shape
        dtype = np.uint8 if shape.num_experts <= 256 else np.uint16
        self._experts_SLK = np.zeros((num_places, shape.num_layers, shape.num_chosen), dtype)
        self._keys_SIC = np.zeros((num_places, shape.num_indexers, shape.num_keys), np.int32)
        self._has_keys_S = np.zeros(num_places, bool)
        """Whose tokens saw fewer keys than there were; the others' rows are never touched."""

    def write(self, place_T: IntArray, recorder: Recorder) -> None:
        """Lanes may write at once, each its own places."""
        if (experts_TLK := recorder.taken_experts) is not None:
            self._experts_SLK[place_T] = experts_TLK
        if self._shape.num_indexers:
            self._has_keys_S[place_T] = False
            if (keys_TIC := recorder.taken_keys) is not None:
                is_full_T = keys_TIC[:, 0, -1] != NONE
                self._has_keys_S[place_T] = is_full_T
                self._keys_SIC[place_T[is_full_T]] = keys_TIC[is_full_T]

    def read(self, place_N: IntArray) -> RouteRecord:
        """What the tokens at these places of a sequence chose, in order."""
        keys_NIC = np.full((len(place_N), *self._keys_SIC.shape[1:]), NONE)
        has_keys_N = self._has_keys_S[place_N]
        keys_NIC[has_keys_N] = self._keys_SIC[place_N[has_keys_N]]
        return RouteRecord(self._experts_SLK[place_N], keys_NIC)


@dataclass(frozen=True, slots=True, eq=False)
class RouteRecord:
    """Choices of a sequence's tokens from its first on."""

    experts_NLK: AnyArray
    keys_NIC: AnyArray
    """Ascending positions and then NONE; a row without any means all up to the token's own."""

    def encode(self) -> bytes:
        num_tokens, num_layers, num_chosen = self.experts_NLK.shape
        _, num_indexers, num_keys = self.keys_NIC.shape
        head = HEAD.pack(MAGIC, num_tokens, num_layers, num_chosen, num_indexers, num_keys)
        width = self.experts_NLK.dtype.itemsize
        parts = [bytes([width]), self.experts_NLK.tobytes()]
        parts += [_as_bits(self.keys_NIC[:, i]).tobytes() for i in range(num_indexers)]
        return head + zstandard.ZstdCompressor(LEVEL).compress(b"".join(parts))

    @staticmethod
    def decode(data: bytes, shape: RouteShape) -> RouteRecord:
        """Raises InvalidRequest for what is no record of such a base."""
        magic, num_tokens, *given = HEAD.unpack_from(data) if len(data) >= HEAD.size else (b"", 0)
        wanted = [shape.num_layers, shape.num_chosen, shape.num_indexers, shape.num_keys]
        if magic != MAGIC or given != wanted:
            raise InvalidRequest(f"not a record of this base's routes: {given}, not {wanted}")
        raw = zstandard.ZstdDecompressor().decompress(data[HEAD.size :])
        dtype: Any = np.uint8 if raw[0] == 1 else np.uint16
        count = num_tokens * shape.num_layers * shape.num_chosen
        experts = np.frombuffer(raw, dtype, count, 1)
        start, size = 1 + experts.nbytes, num_tokens * -(-num_tokens // 8)
        keys_NIC = np.full((num_tokens, shape.num_indexers, shape.num_keys), NONE)
        for i in range(shape.num_indexers):
            bits = np.frombuffer(raw, np.uint8, size, start + i * size).reshape(num_tokens, -1)
            keys_NIC[:, i] = _as_positions(bits, shape.num_keys)
        return RouteRecord(
            experts.reshape(num_tokens, shape.num_layers, shape.num_chosen), keys_NIC
        )


def _as_bits(keys_NC: AnyArray) -> AnyArray:
    """Which positions each token sees, as bits that differ from its predecessor's, `[N, N / 8]`."""
    num_tokens = len(keys_NC)
    sees_NN = np.zeros((num_tokens, num_tokens), bool)
    row, column = np.nonzero(keys_NC != NONE)
    sees_NN[row, keys_NC[row, column]] = True
    bits = np.packbits(sees_NN, axis=1)
    bits[1:] ^= bits[:-1].copy()
    return bits


def _as_positions(bits: AnyArray, num_keys: int) -> AnyArray:
    num_tokens = len(bits)
    sees_NN = np.unpackbits(np.bitwise_xor.accumulate(bits, axis=0), axis=1, count=num_tokens)
    keys_NC = np.full((num_tokens, num_keys), NONE)
    row, position = np.nonzero(sees_NN)
    nth = np.arange(len(row)) - np.searchsorted(row, row)
    keys_NC[row, nth] = position
    return keys_NC
