"""What the tokens of a sequence chose on their way through a model, kept and encoded.

Shapes: T tokens of a batch, N tokens of a sequence, L layers with experts, K experts of a token,
I indexers, C chosen keys of a query, S places in the page cache, W bytes of a bit a position.

Sampling keeps choices beside keys and values, in the same pages, so what a shared prefix chose is
there for all who share it. A record takes L * K bytes per token (two each above 256 experts). What
indexers chose is a set of earlier positions: a bit for each, compressed. From token to token it
changes little, so a record has the difference of neighbours, a frame for each indexer: whoever
reads it needs one layer's positions at a time, and as numbers they are 16 KB a token.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from torch import Tensor

from openmint.errors import InvalidRequest
from openmint.layers.sparse import NONE
from openmint.models.model import RouteShape
from openmint.types import AnyArray, IntArray

HEAD = struct.Struct("<4sIIIII")
FRAME = struct.Struct("<I")
"""Before each frame, its size."""
MAGIC = b"rt02"
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
        self._keys.append(None if own_TC is None else own_TC.int())
        return own_TC

    @property
    def taken_experts(self) -> AnyArray | None:
        """`[T, L, K]`; None where no layer has experts."""
        return torch.stack(self._experts, dim=1).cpu().numpy() if self._experts else None

    @property
    def taken_keys(self) -> list[AnyArray]:
        """`[T, C]` of each indexer; none when every token saw all keys up to its own."""
        return [own_TC.cpu().numpy() for own_TC in self._keys if own_TC is not None]


class RouteCache:
    """The choices of all tokens in the page cache. Memory is taken where it is written to."""

    def __init__(self, shape: RouteShape, num_places: int) -> None:
        self._shape = shape
        size = num_places, shape.num_layers, shape.num_chosen
        self._experts_SLK = np.zeros(size, shape.expert_dtype)
        self._seen: dict[int, bytes] = {}
        """By places, which positions each indexer left, packed; none where a token saw all up to
        its own."""

    def write(self, place_T: IntArray, recorder: Recorder) -> None:
        """Lanes may write at once, each its own places."""
        if (experts_TLK := recorder.taken_experts) is not None:
            self._experts_SLK[place_T] = experts_TLK
        if self._shape.num_indexers:
            for place in place_T.tolist():
                self._seen.pop(place, None)
        if keys_ITC := recorder.taken_keys:
            for row in np.flatnonzero(keys_ITC[0][:, -1] != NONE):
                chosen_IC = np.stack([keys_TC[row] for keys_TC in keys_ITC])
                self._seen[int(place_T[row])] = _pack(chosen_IC)

    def record(self, place_N: IntArray) -> bytes:
        """What the tokens at these places of a sequence chose, in order."""
        seen_N = [self._seen.get(place) for place in place_N.tolist()]
        return encode(self._experts_SLK[place_N], seen_N, self._shape)


def encode(experts_NLK: AnyArray, seen_N: Sequence[bytes | None], shape: RouteShape) -> bytes:
    """A record of these experts and of what `_pack` made of the keys."""
    num_tokens, num_layers, num_chosen = experts_NLK.shape
    counts = (num_layers, num_chosen, shape.num_indexers, shape.num_keys)
    compress = zstandard.ZstdCompressor(LEVEL).compress
    frames = [compress(experts_NLK.tobytes())]
    seen = [(n, _unpack(bits, shape.num_indexers)) for n, bits in enumerate(seen_N) if bits]
    for i in range(shape.num_indexers):
        bits_NW = np.zeros((num_tokens, -(-num_tokens // 8)), np.uint8)
        for n, bits_IW in seen:
            bits_NW[n, : bits_IW.shape[1]] = bits_IW[i]
        bits_NW[1:] ^= bits_NW[:-1].copy()
        frames.append(compress(bits_NW.tobytes()))
    sized = [FRAME.pack(len(frame)) + frame for frame in frames]
    return b"".join([HEAD.pack(MAGIC, num_tokens, *counts), *sized])


@dataclass(frozen=True, slots=True, eq=False)
class RouteRecord:
    """Choices of a sequence's tokens from its first on."""

    experts_NLK: AnyArray
    num_keys: int
    frames: tuple[bytes, ...]
    """One of each indexer."""

    @staticmethod
    def decode(data: bytes, shape: RouteShape) -> RouteRecord:
        """Raises InvalidRequest for what is no record of such a base."""
        magic, num_tokens, *given = HEAD.unpack_from(data) if len(data) >= HEAD.size else (b"", 0)
        wanted = [shape.num_layers, shape.num_chosen, shape.num_indexers, shape.num_keys]
        if magic != MAGIC or given != wanted:
            raise InvalidRequest(f"not a record of this base's routes: {given}, not {wanted}")
        experts, *frames = _split(data[HEAD.size :])
        experts_NLK = np.frombuffer(zstandard.decompress(experts), shape.expert_dtype)
        return RouteRecord(
            experts_NLK.reshape(num_tokens, shape.num_layers, shape.num_chosen),
            shape.num_keys,
            tuple(frames),
        )

    def keys(self, indexer: int) -> IntArray:
        """Ascending positions and then NONE, `[N, C]`; a row without any means all up to the
        token's own."""
        num_tokens = len(self.experts_NLK)
        bits_NW = np.frombuffer(zstandard.decompress(self.frames[indexer]), np.uint8)
        bits_NW = np.bitwise_xor.accumulate(bits_NW.reshape(num_tokens, -1), axis=0)
        row, position = np.nonzero(np.unpackbits(bits_NW, axis=1))
        keys_NC = np.full((num_tokens, self.num_keys), NONE)
        keys_NC[row, np.arange(len(row)) - np.searchsorted(row, row)] = position
        return keys_NC


def _split(data: bytes) -> list[bytes]:
    frames, start = [], 0
    while start < len(data):
        (size,) = FRAME.unpack_from(data, start)
        start += FRAME.size + size
        frames.append(data[start - size : start])
    return frames


def _pack(chosen_IC: AnyArray) -> bytes:
    """Of one token, ascending positions of each indexer: a bit for each, compressed."""
    sees_IN = np.zeros((len(chosen_IC), int(chosen_IC.max()) + 1), bool)
    sees_IN[np.arange(len(chosen_IC))[:, None], chosen_IC] = True
    return zstandard.compress(np.packbits(sees_IN, axis=1).tobytes(), LEVEL)


def _unpack(packed: bytes, num_indexers: int) -> AnyArray:
    """`[I, W]`."""
    return np.frombuffer(zstandard.decompress(packed), np.uint8).reshape(num_indexers, -1)
