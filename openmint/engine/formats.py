"""A run's tensors to and from the bytes that the store keeps.

A revision is an adapter file (`store/adapter_file.py`); a training state is a safetensors file of
the flat vectors. Both are checked against the base before a single value is used.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from openmint.engine.optimizer import AdamState, is_finite
from openmint.engine.runs import RunSnapshot
from openmint.errors import InvalidRequest
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.store.adapter_file import check_adapter, encode_adapter
from openmint.store.blobs import BlobStore
from openmint.store.safetensors_header import encode_safetensors, read_header
from openmint.types import BaseInfo, Digest, LoraSpec

PREFIX = "base_model.model."
TRAINING_FORMAT = "openmint-training/1"
VECTORS = ("params", "exp_avg", "exp_avg_sq")
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def encode_revision(weights: AdapterWeights, base: BaseInfo) -> bytes:
    """The adapter file of these weights; equal weights give equal bytes."""
    tensors = {}
    for path, (a_RI, b_RO) in weights.views.items():
        for name, tensor in (("lora_A", a_RI), ("lora_B", b_RO.t())):
            tensors[f"{PREFIX}{path}.{name}.weight"] = (
                DTYPE_NAMES[tensor.dtype],
                tuple(tensor.shape),
                _raw(tensor),
            )
    return encode_adapter(tensors, base.digest, weights.spec)


def decode_revision(
    data: bytes, base: BaseInfo, dtype: torch.dtype, revision: Digest
) -> AdapterWeights:
    """Weights in host memory from an adapter file.

    Raises InvalidRequest with the list of what doesn't match.
    """
    spec = check_adapter(data, base).spec
    layout = AdapterLayout(spec, base.targets_of(spec))
    flat_P = torch.empty(layout.num_params, dtype=dtype)
    tensors = safetensors.torch.load(data)
    for path, (a_RI, b_RO) in layout.views(flat_P).items():
        a_RI.copy_(tensors[f"{PREFIX}{path}.lora_A.weight"])
        b_RO.copy_(tensors[f"{PREFIX}{path}.lora_B.weight"].t())
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


def decode_training(data: bytes, base: BaseInfo) -> RunSnapshot:
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
    num_params = AdapterLayout(spec, base.targets_of(spec)).num_params
    problems = [f"{name} is missing" for name in VECTORS if name not in header.tensors]
    problems += [
        f"{name} is {entry.dtype} {list(entry.shape)}, not F32 [{num_params}]"
        for name, entry in header.tensors.items()
        if (entry.dtype, entry.shape) != ("F32", (num_params,))
    ]
    problems += [f"{name} is unknown" for name in header.tensors if name not in (*VECTORS, "grads")]
    tensors = {} if problems else safetensors.torch.load(data)
    problems += [f"{name} holds NaN or inf" for name, t in tensors.items() if not is_finite(t)]
    if problems:
        raise InvalidRequest(f"a state of {spec} doesn't fit: {'; '.join(problems[:10])}")
    moved = {name: tensor.to(base.device) for name, tensor in tensors.items()}
    params_P, avg_P, avg_sq_P = (moved[name] for name in VECTORS)
    state = AdamState(params_P, avg_P, avg_sq_P, num_steps)
    return RunSnapshot(spec, state, moved.get("grads"))


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class AdapterArchive:
    """Revisions and training states in the store, encoded and checked. Any thread may call it."""

    def __init__(self, blobs: BlobStore, base: BaseInfo, dtype: torch.dtype) -> None:
        self._blobs, self._base, self._dtype = blobs, base, dtype

    def save_revision(self, weights: AdapterWeights) -> tuple[Digest, int]:
        """Digest and size of the adapter file, which is durable on return."""
        data = encode_revision(weights, self._base)
        return self._blobs.put(data), len(data)

    def load_revision(self, revision: Digest) -> AdapterWeights:
        return decode_revision(self._blobs.get(revision), self._base, self._dtype, revision)

    def save_training(self, snapshot: RunSnapshot) -> tuple[Digest, int]:
        data = encode_training(snapshot, self._base)
        return self._blobs.put(data), len(data)

    def load_training(self, digest: Digest) -> RunSnapshot:
        return decode_training(self._blobs.get(digest), self._base)

    def load_as_training(self, revision: Digest) -> RunSnapshot:
        """A revision's weights as the start of a training session."""
        weights = decode_revision(self._blobs.get(revision), self._base, torch.float32, revision)
        return RunSnapshot(
            weights.spec, AdamState.fresh(weights.flat_P.to(self._base.device)), None
        )
