import json

import numpy as np
import pytest
import zstandard

from openmint.errors import InvalidRequest, TooLarge, UnsupportedFormat
from openmint.wire import decode, proto, requests

TARGETS = {"data": [2, 3], "dtype": "int64", "shape": [2]}


def json_body(inputs=None, chunks=None, **changes):
    chunks = chunks or [{"type": "encoded_text", "tokens": [1, 2]}]
    datum = {
        "model_input": {"chunks": chunks},
        "loss_fn_inputs": inputs or {"target_tokens": TARGETS},
    }
    given = {"data": [datum], "loss_fn": "cross_entropy", **changes}
    return json.dumps({"model_id": "m", "seq_id": 1, "forward_backward_input": given}).encode()


def train(body):
    (datum,), _ = decode.train_request(body, "application/json").content()
    return datum


def proto_body(**tensor):
    message = proto.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(2, dtype="<i4").tobytes()
    datum.loss_fn_inputs["target_tokens"].CopyFrom(proto.Tensor(**tensor))
    return message.SerializeToString()


def test_json_wire_of_older_sdks_decodes():
    request = decode.train_request(json_body(), "application/json", forward_only=True)
    assert request.forward_only
    assert train(json_body()).inputs["target_tokens"].tolist() == [2, 3]


def test_forward_input_is_read_too():
    body = json_body().replace(b"forward_backward_input", b"forward_input")
    assert train(body).tokens_N.tolist() == [1, 2]


def test_sparse_json_tensor_unfolds():
    tensor = {
        "data": [7, 8],
        "dtype": "int64",
        "shape": [2, 3],
        "sparse_crow_indices": [0, 1, 2],
        "sparse_col_indices": [2, 0],
    }
    values = train(json_body({"target_tokens": tensor})).inputs["target_tokens"]
    assert values.tolist() == [[0, 0, 7], [8, 0, 0]]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (json_body(loss_fn_config={"a": "x"}), "loss_fn_config/a"),
        (json_body(surprise=1), "surprise"),
        (json_body({"t": {**TARGETS, "shape": [3]}}), "shape"),
        (json_body({"t": {**TARGETS, "shape": [-1, -2]}}), "shape"),
        (json_body({"t": {**TARGETS, "data": [2, 3.5]}}), "integers"),
        (json_body({"t": {**TARGETS, "data": [2, 1 << 70]}}), "fit"),
        (json_body({"t": {**TARGETS, "dtype": "object"}}), "dtype"),
        (json_body({"t": {**TARGETS, "sparse_crow_indices": [0]}}), "sparse_col"),
        (json_body(chunks=[{"type": "image", "data": "", "format": "png"}]), "image"),
        (json_body(chunks=[{"type": "dmel", "dmel": ""}]), "dmel"),
        (b'{"model_id":"m","seq_id":1}', "forward_backward_input"),
    ],
)
def test_malformed_json_is_refused_by_name(body, says):
    with pytest.raises(InvalidRequest, match=says):
        train(body)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ({"dense": b"123", "dtype": 2, "shape": [1]}, "divide"),
        ({"dense": b"12345678", "dtype": 0, "shape": [1]}, "dtype"),
        ({"dense": b"12345678", "dtype": 2, "shape": [5]}, "shape"),
        ({"sparse_csr": {"values": b"12345678"}, "dtype": 2, "shape": [2, 2]}, "sparse"),
    ],
)
def test_malformed_proto_tensor_is_refused(tensor, says):
    with pytest.raises(InvalidRequest, match=says):
        decode.train_request(proto_body(**tensor), decode.PROTOBUF).content()


def test_garbage_protobuf_is_refused():
    with pytest.raises(InvalidRequest, match="protobuf"):
        decode.train_request(b"\xff" * 40, decode.PROTOBUF)


def test_sparse_memory_bomb_is_refused_before_it_is_allocated():
    crow = np.zeros(3, dtype="<i8").tobytes()
    csr = {"values": b"", "crow_indices": crow, "col_indices": b""}
    body = proto_body(sparse_csr=csr, dtype=2, shape=[2, 1 << 40])
    with pytest.raises(InvalidRequest, match="unfold"):
        decode.train_request(body, decode.PROTOBUF).content()


def test_row_indices_whose_differences_wrap_are_refused():
    """Unchecked, numpy would write where they point: 2^63 - 1 to -2 is 'three rows on' in int64."""
    crow = np.array([0, 2**63 - 1, -2, 1], dtype="<i8").tobytes()
    csr = {"values": bytes(8), "crow_indices": crow, "col_indices": bytes(8)}
    body = proto_body(sparse_csr=csr, dtype=2, shape=[3, 4])
    with pytest.raises(InvalidRequest, match="row indices"):
        decode.train_request(body, decode.PROTOBUF).content()


def test_zstd_body_unfolds_up_to_the_limit():
    packed = zstandard.compress(b"x" * 1000)
    assert decode.decompress(packed, "zstd", 1000) == b"x" * 1000
    with pytest.raises(TooLarge, match="999"):
        decode.decompress(packed, "zstd", 999)
    with pytest.raises(InvalidRequest, match="zstd"):
        decode.decompress(b"plain", "zstd", 999)
    with pytest.raises(UnsupportedFormat, match="br"):
        decode.decompress(b"", "br", 999)


@pytest.mark.parametrize(
    ("adam", "says"),
    [
        ('{"learning_rate": NaN}', "learning_rate"),
        ('{"learning_rate": -1}', "learning_rate"),
        ('{"beta1": 1.0}', "beta1"),
        ('{"eps": Infinity}', "eps"),
        ('{"momentum": 0.5}', "momentum"),
    ],
)
def test_bad_adam_params_are_refused_by_name(adam, says):
    raw = f'{{"model_id": "m", "adam_params": {adam}}}'.encode()
    with pytest.raises(InvalidRequest, match=says):
        decode.adam_params(requests.parse(requests.OptimStep, raw))


def test_dimuon_is_refused_by_name():
    raw = b'{"model_id": "m", "optimizer_params": {"type": "dimuon", "learning_rate": 1}}'
    with pytest.raises(InvalidRequest, match="dimuon"):
        decode.adam_params(requests.parse(requests.OptimStep, raw))
