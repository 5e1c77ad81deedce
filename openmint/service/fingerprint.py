"""A digest of a decoded request: equal content, equal fingerprint, whatever the wire did to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def fingerprint(*parts: object) -> bytes:
    """16 bytes that tell a retry of a request from another request under the same seq_id."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        _feed(state, part)
    return state.digest()


def _feed(state: Any, value: object) -> None:
    if isinstance(value, np.ndarray):
        state.update(f"<a{value.dtype.str}{value.shape}".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        state.update(f"<d{type(value).__name__}".encode())
        for field in fields(value):
            _feed(state, getattr(value, field.name))
    elif isinstance(value, Mapping):
        state.update(f"<m{len(value)}".encode())
        for key in sorted(value):
            _feed(state, key)
            _feed(state, value[key])
    elif isinstance(value, (list, tuple)):
        state.update(f"<l{len(value)}".encode())
        for item in value:
            _feed(state, item)
    else:
        text = repr(value).encode()
        state.update(f"<s{len(text)}:".encode() + text)
