"""Revisions and training states as files: equal ones are equal bytes; unsound ones are refused."""

import json
from dataclasses import replace

import pytest
import torch

from openmint.engine.formats import AdapterArchive, decode_training, encode_training
from openmint.engine.optimizer import AdamState
from openmint.engine.runs import RunSnapshot
from openmint.errors import InvalidRequest, OpenMintError
from openmint.layers.adapters import AdapterLayout, AdapterWeights
from openmint.store.folder_store import FolderStore
from openmint.store.safetensors_header import encode_safetensors, read_header
from openmint.types import BaseInfo, Digest, LoraSpec, TargetModule, stacks_of

SPEC = LoraSpec(rank=2, train_attn=False, train_unembed=False)
TARGET = TargetModule("model.layers.0.mlp.up_proj", "mlp", 6, 10)
BASE = BaseInfo(
    *("tiny", Digest("sha256:" + "0" * 64), "llama", "", "float32", "cpu", 96, 64, (2,), 1, 1, 8),
    stacks_of([TARGET]),
)
NUM_PARAMS = 2 * (6 + 10)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(NUM_PARAMS, generator=generator) for _ in range(4)]
    return RunSnapshot(SPEC, AdamState(*vectors[:3], 7), vectors[3])


def parts_of(data):
    """Tensors and metadata of a file, to be changed."""
    header = read_header(data)
    tensors = {
        name: (entry.dtype, entry.shape, data[entry.start : entry.stop])
        for name, entry in header.tensors.items()
    }
    return tensors, dict(header.metadata)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_revisions_file_is_its_header_and_the_flat_vector(tmp_path, dtype):
    targets = [
        TargetModule(f"model.layers.{layer}.{name}", group, num_in, num_out)
        for layer in range(11)  # 10 comes after 9 here, and before 2 among names
        for name, group, num_in, num_out in (
            ("mlp.up_proj", "mlp", 6, 10),
            ("mlp.down_proj", "mlp", 10, 6),
            ("self_attn.q_proj", "attn", 6, 4),
        )
    ]
    base = replace(
        BASE, dtype=dtype, stacks=stacks_of((*targets, TargetModule("lm_head", "unembed", 6, 9)))
    )
    spec = LoraSpec(rank=3)
    layout = AdapterLayout(spec, base.targets_of(spec))
    flat_P = torch.randn(layout.num_params).to(getattr(torch, dtype))
    archive = AdapterArchive(blobs := FolderStore(tmp_path), base)
    digest, size = archive.save_revision(AdapterWeights(layout, flat_P))
    data = blobs.get(digest)
    assert len(data) == size
    assert bytes(data).endswith(flat_P.view(torch.uint8).numpy().tobytes())
    entries = read_header(data).tensors
    assert list(entries) == sorted(entries)
    assert entries["mlp.up_proj.lora_B"].shape == (11, 3, 10)
    loaded = archive.load_revision(digest)
    assert torch.equal(loaded.flat_P, flat_P)
    # By name, too: a layer's A and B are where its views say.
    at = entries["self_attn.q_proj.lora_B"]
    stored = torch.frombuffer(bytearray(data[at.start : at.stop]), dtype=flat_P.dtype)
    for layer in range(11):
        _, b_RO = loaded.views[f"model.layers.{layer}.self_attn.q_proj"]
        assert torch.equal(stored.view(11, 3, 4)[layer], b_RO)


def test_a_state_comes_back_and_is_the_same_bytes_each_time():
    data = encode_training(state(), BASE)
    assert data == encode_training(state(), BASE)
    back = decode_training(data, BASE)
    assert (back.spec, back.num_optim_steps) == (SPEC, 7)
    torch.testing.assert_close(back.state.params_P, state().state.params_P, rtol=0, atol=0)
    torch.testing.assert_close(back.grads_P, state().grads_P, rtol=0, atol=0)
    without = decode_training(encode_training(replace(state(), grads_P=None), BASE), BASE)
    assert without.grads_P is None


NAN = torch.full((NUM_PARAMS,), float("nan")).numpy().tobytes()
CHANGES = {
    "params is missing": lambda t, m: t.pop("params"),
    "extra is unknown": lambda t, m: t.update(extra=t["params"]),
    r"exp_avg is F32 \[16\]": lambda t, m: t.update(
        exp_avg=("F32", (16,), t["exp_avg"][2][: 16 * 4])
    ),
    "params is BF16": lambda t, m: t.update(
        params=("BF16", (NUM_PARAMS,), t["params"][2][: 2 * NUM_PARAMS])
    ),
    "exp_avg_sq holds NaN": lambda t, m: t.update(exp_avg_sq=("F32", (NUM_PARAMS,), NAN)),
    "grads holds NaN": lambda t, m: t.update(grads=("F32", (NUM_PARAMS,), NAN)),
    "not a training state": lambda t, m: m.update(format="else"),
    "belongs to base": lambda t, m: m.update(base="sha256:" + "1" * 64),
    "sound header": lambda t, m: m.update(num_optim_steps="many"),
    "without a sound": lambda t, m: m.update(spec=json.dumps({"rank": 2, "colour": "red"})),
}


@pytest.mark.parametrize("says", CHANGES)
def test_what_does_not_fit_is_refused_by_name(says):
    tensors, metadata = parts_of(encode_training(state(), BASE))
    CHANGES[says](tensors, metadata)
    with pytest.raises(InvalidRequest, match=says):
        decode_training(encode_safetensors(tensors, metadata), BASE)


def test_a_file_cut_off_anywhere_is_refused():
    data = encode_training(state(), BASE)
    for size in range(0, len(data), 7):
        with pytest.raises(OpenMintError):
            decode_training(data[:size], BASE)
