"""Bodies of the Tinker JSON wire. Unknown fields are refused, because ignoring one could mislead.

Fields that older or newer SDKs send and that change no result are listed and then unused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from openmint.errors import InvalidRequest
from openmint.wire.tensors import TensorJson

SeqId = Annotated[int, Field(ge=0, le=1 << 53)]
TtlSeconds = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)]
Text = Annotated[str, Field(max_length=4096)]
Id = Annotated[str, Field(min_length=1, max_length=512)]
Metadata = dict[str, Any]


class Body(BaseModel):
    """A request body: exact types, no unknown field; `type` repeats the name of the call."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    type: str | None = None


BodyT = TypeVar("BodyT", bound=Body)


def parse(kind: type[BodyT], raw: bytes) -> BodyT:
    """The body as `kind`. Raises InvalidRequest with a JSON pointer to the first fault."""
    try:
        return kind.model_validate_json(raw or b"{}")
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        pointer = "".join(f"/{part}" for part in fault["loc"])
        message = fault["msg"]
        if fault["type"] == "extra_forbidden":
            known = ", ".join(sorted(kind.model_fields))
            message = f"unknown field; this call knows {known}"
        raise InvalidRequest(f"body{pointer}: {message}") from None


class RunRequest(BaseModel):
    """Which request of which run a body is, whatever else it holds."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model_id: Id
    seq_id: SeqId


def run_request(raw: bytes) -> RunRequest | None:
    """What a body that may be faulty elsewhere says of its run and seq_id; None if it can't."""
    try:
        return RunRequest.model_validate_json(raw)
    except ValidationError:
        return None


# -- start-up and sessions ------------------------------------------------------------------------


class CreateSession(Body):
    tags: list[Text] = []
    user_metadata: Metadata | None = None
    sdk_version: Text | None = None
    project_id: Text | None = None
    display_name: Text | None = None


class Heartbeat(Body):
    session_id: Id


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Body):
    reason: FinishReason | None = None
    detail: Text | None = None


class SessionProject(Body):
    project_id: Id


class SearchCursor(Body):
    last_created_at: AwareDatetime
    last_session_id: Id


class SearchOwner(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[Text] | None = None


class StatusQuery(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: Annotated[list[Text], Field(max_length=8)] | None = None


class SearchSessions(Body):
    """Each filter has a limit, because the database reads all of them as one expression."""

    session_id: Id | None = None
    project_ids: Annotated[list[Text], Field(max_length=1000)] | None = None
    user_metadata: Annotated[dict[str, str], Field(max_length=64)] = {}
    display_name: Text | None = None
    owner: SearchOwner = SearchOwner()
    statuses: Annotated[list[StatusQuery], Field(max_length=8)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


# -- training -------------------------------------------------------------------------------------


class LoraConfig(Body):
    rank: int
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(BaseModel):
    """Names the optimizer; further fields belong to families that we do not have."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Text = "adamw"


class CreateModel(Body):
    session_id: Id
    model_seq_id: SeqId
    base_model: Id
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class GetInfo(Body):
    model_id: Id


class EncodedText(Body):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[int]


class OtherChunk(BaseModel):
    """An image or sound; recognised so that it can be refused by name."""

    model_config = ConfigDict(extra="allow")

    type: Literal["image", "image_asset_pointer", "dmel"]


class ModelInput(Body):
    chunks: list[Annotated[EncodedText | OtherChunk, Field(discriminator="type")]]


class DatumJson(Body):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorJson] = {}
    model_input_spans: list[Any] | None = None
    loss_fn_input_spans: list[Any] | None = None


class ForwardBackwardInput(Body):
    data: list[DatumJson]
    loss_fn: Text
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackward(Body):
    """The JSON wire of SDKs before protobuf; `/forward` names its input `forward_input`."""

    model_id: Id
    seq_id: SeqId | None = None
    forward_backward_input: ForwardBackwardInput | None = None
    forward_input: ForwardBackwardInput | None = None


class AdamJson(Body):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Body):
    model_id: Id
    seq_id: SeqId | None = None
    adam_params: AdamJson | None = None
    optimizer_params: OptimizerConfig | None = None


# -- checkpoints ----------------------------------------------------------------------------------


class SaveWeights(Body):
    model_id: Id
    path: str | None = None
    seq_id: SeqId | None = None
    ttl_seconds: TtlSeconds | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveForSampler(Body):
    model_id: Id
    path: str | None = None
    sampling_session_seq_id: SeqId | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: SeqId | None = None
    ttl_seconds: TtlSeconds | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveExternal(Body):
    model_id: Id
    path: str
    seq_id: SeqId | None = None
    ttl_seconds: TtlSeconds | None = None
    age_encryption_recipients: list[Text] | None = None


class LoadWeights(Body):
    model_id: Id | None = None
    seq_id: SeqId | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    base_model: Id | None = None
    user_metadata: Metadata | None = None
    path: Id
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: Text | None = None


class WeightsInfo(Body):
    tinker_path: Id


class CopyWeights(Body):
    source_path: Id
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    destination_project_id: Text | None = None
    ttl_seconds: TtlSeconds | None = None
    weights_access_token: Text | None = None


class CheckpointTtl(Body):
    ttl_seconds: TtlSeconds | None


# -- sampling -------------------------------------------------------------------------------------


class CreateSampler(Body):
    session_id: Id
    sampling_session_seq_id: SeqId
    base_model: Id | None = None
    model_path: Id | None = None


class JoinSampler(Body):
    sampling_session_id: Id


class SamplingParamsJson(Body):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Body):
    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingParamsJson = SamplingParamsJson()
    base_model: Id | None = None
    model_path: Id | None = None
    sampling_session_id: Id | None = None
    seq_id: SeqId | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorJson | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


# -- futures --------------------------------------------------------------------------------------


class RetrieveFuture(Body):
    request_id: Id
    model_id: Id | None = None
    allow_metadata_only: bool = False


class CancelFuture(Body):
    request_id: Id


class FuturesTarget(Body):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: SeqId = 0


class RetrieveFutures(Body):
    target: FuturesTarget
    prev_cursor: SeqId = 0
    timeout: float | None = None
    retrieved_request_ids: list[Id] = []
