"""A run's tensors to and from the bytes that the store keeps.

A revision is an adapter file (`store/adapter_file.py`); a training state is a safetensors file of
the flat vectors. Both are checked against the base before a single value is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch

from openmint.engine.optimizer import AdamState, is_finite
from openmint.engine.runs import RunSnapshot
from openmint.errors import InvalidRequest
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.models.loader import DTYPES
from openmint.store.adapter_file import check_adapter, encode_adapter, expected_tensors
from openmint.store.blobs import BlobStore
from openmint.store.safetensors_header import FileBytes, Header, encode_safetensors, read_header
from openmint.types import BaseInfo, Digest, LoraSpec

TRAINING_FORMAT = "openmint-training/2"
VECTORS = ("params", "exp_avg", "exp_avg_sq")
MOST_LAYOUTS = 256
"""Shapes of adapters whose layout is kept; clients choose ranks and alphas."""
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def encode_revision(weights: AdapterWeights, base: BaseInfo) -> bytes:
    """The adapter file of these weights; equal weights give equal bytes."""
    dtype = weights.flat_P.dtype
    raw = weights.flat_P.detach().cpu().view(torch.uint8).numpy().data
    tensors, start = {}, 0
    for name, shape in expected_tensors(base, weights.spec).items():
        stop = start + math.prod(shape) * dtype.itemsize
        tensors[name] = (DTYPE_NAMES[dtype], shape, raw[start:stop])
        start = stop
    return encode_adapter(tensors, base.digest, weights.spec)


def decode_revision(
    data: memoryview,
    base: BaseInfo,
    revision: Digest,
    layout_of: Callable[[LoraSpec], AdapterLayout],
) -> AdapterWeights:
    """Weights in host memory, in the base's dtype, from an adapter file, whose memory they keep.

    Raises InvalidRequest with the list of what doesn't match.
    """
    header = check_adapter(data, base)
    layout = layout_of(header.spec)
    start = min(entry.start for entry in header.tensors.values())
    flat_P = torch.frombuffer(data, dtype=DTYPES[base.dtype], offset=start)
    assert len(flat_P) == layout.num_params
    return AdapterWeights(layout, flat_P, revision)


def encode_training(snapshot: RunSnapshot, base: BaseInfo) -> bytes:
    """The training state file: weights, moments, step count and any pending gradient, all fp32;
    equal states give equal bytes."""
    state = snapshot.state
    vectors = {
        "params": state.params_P,
        "exp_avg": state.exp_avg_P,
        "exp_avg_sq": state.exp_avg_sq_P,
    }
    if snapshot.grads_P is not None:
        vectors["grads"] = snapshot.grads_P
    metadata = {
        "format": TRAINING_FORMAT,
        "base": base.digest,
        "spec": json.dumps(asdict(snapshot.spec), sort_keys=True),
        "num_optim_steps": str(state.num_optim_steps),
    }
    tensors = {
        name: ("F32", tuple(each.shape), memoryview(each.cpu().numpy().data).cast("B"))
        for name, each in vectors.items()
    }
    return encode_safetensors(tensors, metadata)


def decode_training(data: FileBytes, base: BaseInfo) -> RunSnapshot:
    """The inverse of `encode_training`. Raises InvalidRequest with the list of what doesn't match:
    base, tensor names, shapes, dtypes, values that aren't finite."""
    header = read_header(data)
    metadata = header.metadata
    if metadata.get("format") != TRAINING_FORMAT:
        raise InvalidRequest(f"not a training state: format {metadata.get('format')!r}")
    if metadata.get("base") != base.digest:
        raise InvalidRequest(f"the state belongs to base {metadata.get('base')}, not {base.digest}")
    try:
        spec = LoraSpec(**json.loads(metadata["spec"]))
        num_steps = int(metadata["num_optim_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"a training state without a sound header: {error!r}") from None
    num_params = base.adapter_params(spec)
    problems = [f"{name} is missing" for name in VECTORS if name not in header.tensors]
    problems += [
        f"{name} is {entry.dtype} {list(entry.shape)}, not F32 [{num_params}]"
        for name, entry in header.tensors.items()
        if (entry.dtype, entry.shape) != ("F32", (num_params,))
    ]
    problems += [f"{name} is unknown" for name in header.tensors if name not in (*VECTORS, "grads")]
    tensors = {} if problems else _vectors(data, header)
    problems += [f"{name} holds NaN or inf" for name, t in tensors.items() if not is_finite(t)]
    if problems:
        raise InvalidRequest(f"a state of {spec} doesn't fit: {'; '.join(problems[:10])}")
    moved = {name: tensor.to(base.device) for name, tensor in tensors.items()}
    params_P, avg_P, avg_sq_P = (moved[name] for name in VECTORS)
    state = AdamState(params_P, avg_P, avg_sq_P, num_steps)
    return RunSnapshot(spec, state, moved.get("grads"))


def _vectors(data: FileBytes, header: Header) -> dict[str, torch.Tensor]:
    """Copies, as each of them is to be replaced by itself."""
    return {
        name: torch.from_numpy(np.frombuffer(data, "<f4", entry.shape[0], entry.start).copy())
        for name, entry in header.tensors.items()
    }


class AdapterArchive:
    """Revisions and training states in the store, encoded and checked. Any thread may call it."""

    def __init__(self, blobs: BlobStore, base: BaseInfo) -> None:
        self._blobs, self._base = blobs, base
        # One for all revisions of a shape, with what it finds out about tiles.
        self._layout = lru_cache(MOST_LAYOUTS)(
            lambda spec: AdapterLayout(spec, base.targets_of(spec))
        )

    def save_revision(self, weights: AdapterWeights) -> tuple[Digest, int]:
        """Digest and size of the adapter file, which is durable on return."""
        data = encode_revision(weights, self._base)
        return self._blobs.put(data), len(data)

    def load_revision(self, revision: Digest) -> AdapterWeights:
        return decode_revision(self._blobs.get(revision), self._base, revision, self._layout)

    def save_training(self, snapshot: RunSnapshot) -> tuple[Digest, int]:
        data = encode_training(snapshot, self._base)
        return self._blobs.put(data), len(data)

    def load_training(self, digest: Digest) -> RunSnapshot:
        return decode_training(self._blobs.get(digest), self._base)

    def load_as_training(self, revision: Digest) -> RunSnapshot:
        """A revision's weights as the start of a training session."""
        weights = self.load_revision(revision)
        return RunSnapshot(
            weights.spec, AdamState.fresh(weights.flat_P.to(self._base.device, torch.float32)), None
        )
