import numpy as np
import pytest

from openmint.errors import InvalidRequest
from openmint.service import checks
from openmint.types import BaseInfo, Datum, Digest, LoraSpec, LossSpec

BASE = BaseInfo(
    name="tiny", digest=Digest("sha256:0"), architecture="llama", directory="/x", dtype="float32",
    device="cpu", vocab_size=10, context_length=8, eos_token_ids=(0,), num_params=1,
    weight_bytes=4, max_rank=16, stacks=(),
)  # fmt: skip


def datum(tokens=(1, 2), **inputs):
    arrays = {"target_tokens": np.array([2, 3]), **inputs}
    kept = {name: np.asarray(values) for name, values in arrays.items() if values is not None}
    return Datum(np.asarray(tokens, dtype=np.int64), kept)


def policy_datum(**inputs):
    return datum(**{"logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0], **inputs})


def check(*data, loss="cross_entropy", **config):
    checks.check_data(tuple(data), LossSpec(loss, config), BASE)


def test_good_data_pass():
    check(datum(), datum(weights=[0.5, 1.0]))
    check(datum(target_tokens=[[1, 2], [3, 4]], weights=[[1.0, 0.0], [0.5, 0.5]]))
    check(policy_datum(), loss="ppo", clip_low_threshold=0.9)


@pytest.mark.parametrize(
    ("data", "loss", "config", "says"),
    [
        ((), "cross_entropy", {}, "empty"),
        ((datum(()),), "cross_entropy", {}, "no tokens"),
        ((datum((1, -1)),), "cross_entropy", {}, "-1 at position 1 is outside 0..9"),
        ((datum((1, 10)),), "cross_entropy", {}, "10 at position 1"),
        ((datum(target_tokens=[2, 99]),), "cross_entropy", {}, "99"),
        ((datum(range(9)),), "cross_entropy", {}, "context of tiny holds 8"),
        ((datum((1, 2, 3)),), "cross_entropy", {}, "has length 2"),
        ((datum(target_tokens=[1.0, 2.0]),), "cross_entropy", {}, "int64"),
        ((datum(target_tokens=None),), "cross_entropy", {}, "target_tokens is missing"),
        ((datum(weights=[1.0]),), "cross_entropy", {}, "must match"),
        ((datum(weights=[1.0, np.nan]),), "cross_entropy", {}, "position 1 is nan"),
        ((policy_datum(advantages=[np.inf, 1.0]),), "ppo", {}, "advantages"),
        ((policy_datum(logprobs=[-np.inf, 1.0]),), "dro", {}, "logprobs"),
        ((datum(),), "ppo", {}, "logprobs is missing"),
        ((policy_datum(weights=[1.0, 1.0]),), "ppo", {}, "does not read it"),
        ((policy_datum(target_tokens=[[1], [2]]),), "cispo", {}, "takes shape"),
        ((policy_datum(),), "dro", {"gamma": 1.0}, "gamma"),
        ((policy_datum(),), "dro", {"beta": float("nan")}, "beta"),
        ((policy_datum(),), "ppo", {"clip_low_threshold": 2.0}, "above"),
        ((datum(),), "gspo", {}, "not implemented"),
        ((datum(),), "custom", {}, "client"),
        ((datum(),), "nll", {}, "unknown loss 'nll'"),
    ],
)
def test_bad_data_are_refused_by_name(data, loss, config, says):
    with pytest.raises(InvalidRequest, match=says):
        checks.check_data(data, LossSpec(loss, config), BASE)


@pytest.mark.parametrize("name", ["a/b", "..", "a..b", "nul\0", "x" * 300, "", "-rf", "a b", "é"])
def test_bad_checkpoint_names_are_refused(name):
    with pytest.raises(InvalidRequest):
        checks.check_name(name, "path")


@pytest.mark.parametrize("name", ["A", "a/b", "..", "a..b", "", "x" * 129, None, "-a"])
def test_bad_policy_names_are_refused(name):
    with pytest.raises(InvalidRequest):
        checks.check_policy_name(name)


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_rank_outside_the_limit_is_refused(rank):
    with pytest.raises(InvalidRequest, match="1 to 16"):
        checks.check_spec(LoraSpec(rank), BASE)


def test_an_adapter_without_targets_is_refused():
    spec = LoraSpec(4, train_attn=False, train_mlp=False, train_unembed=False)
    with pytest.raises(InvalidRequest, match="trains nothing"):
        checks.check_spec(spec, BASE)


def test_metadata_values_become_text_and_are_bounded():
    assert checks.check_metadata({"a": 1, "b": True, "c": None}) == {"a": "1", "b": "true"}
    with pytest.raises(InvalidRequest, match="limit"):
        checks.check_metadata({"a": "x" * 20000})
