"""Our messages against those of the installed SDK: same bytes, both ways."""

import numpy as np
import tinker
from tinker.proto import tinker_public_pb2 as sdk
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from openmint.scheduler.work import SampleResult, TrainResult
from openmint.types import Digest, SampledSequence, TopLogprobs
from openmint.wire import decode, encode, proto


def sdk_request(**changes):
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 0.5]},
    )
    given = {"data": [datum], "loss_fn": "cross_entropy", **changes}
    return ForwardBackwardRequest(
        model_id="s:train:1", seq_id=7, forward_backward_input=ForwardBackwardInput(**given)
    )


def decoded(request):
    body = forward_backward_request_to_proto(request).SerializeToString()
    return decode.train_request(body, decode.PROTOBUF)


def test_every_field_has_the_number_and_type_of_the_sdk():
    ours = proto.ForwardBackwardRequest.DESCRIPTOR.file
    for name, message in ours.message_types_by_name.items():
        theirs = sdk.DESCRIPTOR.message_types_by_name.get(name)
        if theirs is None:
            continue
        for field in message.fields:
            twin = theirs.fields_by_number[field.number]
            assert (field.name, field.type) == (twin.name, twin.type), name
            assert field.is_repeated == twin.is_repeated, (name, field.name)


def test_sdk_request_decodes():
    request = decoded(sdk_request())
    assert (request.model_id, request.seq_id, request.forward_only) == ("s:train:1", 7, False)
    (datum,), loss = request.content()
    assert loss.name == "cross_entropy"
    assert datum.tokens_N.tolist() == [1, 2, 3]
    assert datum.inputs["target_tokens"].dtype == np.int64
    assert datum.inputs["weights"].tolist() == [0.0, 1.0, 0.5]


def test_loss_config_of_the_newer_map_wins():
    message = proto.ForwardBackwardRequest(loss_fn="ppo")
    message.loss_fn_config["clip_low_threshold"] = 0.1
    message.loss_fn_config_v2["clip_low_threshold"].number = 0.7
    _, loss = decode.train_request(message.SerializeToString(), decode.PROTOBUF).content()
    assert loss.config == {"clip_low_threshold": 0.7}


def test_sdk_reads_our_training_output():
    logprobs = (
        np.array([-1.0, -2.0], np.float32),
        np.array([[-3.0, -4.0]], np.float32),
        np.array([-5.0], np.float32),
    )
    content_type, body = encode.encode(TrainResult(logprobs, {"loss:sum": 3.5}), encode.PROTOBUF)
    output = deserialize_forward_backward_output(body)
    assert content_type == encode.PROTOBUF
    assert output.metrics == {"loss:sum": 3.5}
    read = [fields["logprobs"].to_numpy().tolist() for fields in output.loss_fn_outputs]
    assert read == [[-1.0, -2.0], [[-3.0, -4.0]], [-5.0]]


def test_sdk_reads_our_sample_output():
    top = TopLogprobs(np.array([[5, 6]]), np.array([[-0.1, -np.inf]], np.float32))
    sequence = SampledSequence(np.array([5]), np.array([-0.1], np.float32), "length", top)
    result = SampleResult(
        (sequence,),
        None,
        Digest("sha256:0"),
        prompt_logprobs_T=np.array([np.nan, -0.5], np.float32),
        topk_prompt_logprobs=TopLogprobs(
            np.array([[0], [9]]), np.array([[-np.inf], [-0.5]], np.float32)
        ),
        target_prompt_logprobs_NK=np.array([[-0.25, np.nan]], np.float32),
        num_cached_tokens=1,
    )
    _, body = encode.encode(encode.SampleAnswer(result), encode.PROTOBUF)
    read = deserialize_sample_response(body)
    assert read.sequences[0].tokens == [5]
    assert read.sequences[0].stop_reason == "length"
    assert read.sequences[0].topk_logprobs_np.token_ids.tolist() == [[5, 0]]
    assert read.prompt_logprobs == [None, -0.5]
    assert read.topk_prompt_logprobs[0] is None
    assert read.target_prompt_logprobs.shape == [1, 2]
    assert read.prompt_cache_hit_tokens == 1


def test_sparse_target_logprobs_keep_their_layout():
    result = SampleResult(
        (), None, Digest("x"), target_prompt_logprobs_NK=np.array([[-1, -2], [-3, -4]], np.float32)
    )
    layout = encode.SparseLayout((0, 1, 2), (1, 0))
    _, body = encode.encode(encode.SampleAnswer(result, layout), encode.PROTOBUF)
    read = deserialize_sample_response(body).target_prompt_logprobs
    assert read.sparse_crow_indices == [0, 1, 2]
    assert list(read.data) == [-2.0, -3.0]
