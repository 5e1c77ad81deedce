"""Plain values to bytes and back: JSON for what is small, the arrays' own bytes behind it.

Frozen dataclasses go by their names, and only those that a reader is given come back: nothing that
lies on disk can name anything else. Sequences come back as tuples.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from openmint.errors import StoreFailed

LENGTH = struct.Struct("<I")


class Codec:
    """Encodes any value; decodes those that are made of the given dataclasses."""

    def __init__(self, kinds: Iterable[type[Any]]) -> None:
        self._kinds = {kind.__name__: kind for kind in kinds}

    def encode(self, value: object) -> bytes:
        arrays: list[np.ndarray[Any, Any]] = []
        tree = self._pack(value, arrays)
        shapes = [(array.dtype.str, array.shape) for array in arrays]
        text = json.dumps([tree, shapes], separators=(",", ":")).encode()
        return b"".join((LENGTH.pack(len(text)), text, *(array.tobytes() for array in arrays)))

    def decode(self, data: bytes) -> Any:
        """The value. Raises StoreFailed for bytes that `encode` did not make."""
        try:
            (size,) = LENGTH.unpack_from(data)
            offset = LENGTH.size + size
            tree, shapes = json.loads(data[LENGTH.size : offset])
            arrays = []
            for name, shape in shapes:
                count = int(np.prod(shape, dtype=np.int64))
                array = np.frombuffer(data, np.dtype(name), count, offset)
                offset += array.nbytes
                arrays.append(array.reshape(shape).copy())
            return self._unpack(tree, arrays)
        except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
            raise StoreFailed(f"the journal holds something unreadable: {error!r}") from error

    def _pack(self, value: object, arrays: list[np.ndarray[Any, Any]]) -> Any:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case bytes():
                arrays.append(np.frombuffer(value, np.uint8))
                return {"bytes": len(arrays) - 1}
            case np.ndarray():
                arrays.append(value)
                return {"array": len(arrays) - 1}
            case Mapping():
                return {"map": {key: self._pack(each, arrays) for key, each in value.items()}}
            case tuple() | list():
                return [self._pack(each, arrays) for each in value]
        name = type(value).__name__
        if not is_dataclass(value) or self._kinds.get(name) is not type(value):
            raise TypeError(f"the codec was not told of {type(value)}")
        parts = {f.name: self._pack(getattr(value, f.name), arrays) for f in fields(value)}
        return {"kind": name, "fields": parts}

    def _unpack(self, tree: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
        match tree:
            case {"array": index}:
                return arrays[index]
            case {"bytes": index}:
                return arrays[index].tobytes()
            case {"map": parts}:
                return {key: self._unpack(each, arrays) for key, each in parts.items()}
            case {"kind": name, "fields": parts}:
                values = {key: self._unpack(each, arrays) for key, each in parts.items()}
                return self._kinds[name](**values)
            case list():
                return tuple(self._unpack(each, arrays) for each in tree)
        return tree
