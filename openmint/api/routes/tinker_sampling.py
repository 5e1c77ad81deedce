"""Tinker: sampling sessions and samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from openmint.api.auth import App, Caller
from openmint.api.bodies import read, takes
from openmint.errors import InvalidRequest
from openmint.service.sampling import SampleRequest
from openmint.types import IntArray, SessionId
from openmint.wire import requests
from openmint.wire.decode import prompt_tokens
from openmint.wire.encode import SparseLayout
from openmint.wire.tensors import TensorJson, Unfolding, from_json

router = APIRouter(prefix="/api/v1")


@router.post("/create_sampling_session", openapi_extra=takes(requests.CreateSampler))
async def create_sampling_session(request: Request, caller: Caller, gateway: App) -> dict[str, str]:
    """Bind a sampling session to a base or to one revision."""
    caller.require("train", "serve")
    body = await read(request, requests.CreateSampler)
    sampler = await gateway.sampling.create(
        caller.tenant,
        SessionId(body.session_id),
        body.sampling_session_seq_id,
        body.base_model,
        body.model_path,
    )
    return {"sampling_session_id": sampler.sampler_id, "type": "create_sampling_session"}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, caller: Caller, gateway: App) -> dict[str, Any]:
    """What a sampling session is bound to."""
    sampler = gateway.sampling.get(caller.tenant, sampler_id)
    return {
        "sampler_id": sampler.sampler_id,
        "base_model": sampler.base.name,
        "model_path": sampler.model_path,
        "revision": sampler.revision,
    }


@router.post("/join_sampling_session", openapi_extra=takes(requests.JoinSampler))
async def join_sampling_session(request: Request, caller: Caller, gateway: App) -> dict[str, Any]:
    """A number for a copy of the client, which spaces its seq_ids apart from the others'."""
    caller.require("train", "serve")
    body = await read(request, requests.JoinSampler)
    sampler = gateway.sampling.get(caller.tenant, body.sampling_session_id)
    sampler.num_clones += 1
    return {"client_counter": sampler.num_clones, "type": "join_sampling_session"}


@router.post("/asample", openapi_extra=takes(requests.Sample))
async def asample(request: Request, caller: Caller, gateway: App) -> dict[str, Any]:
    """Open the future of a sample."""
    caller.require("train", "serve")
    body = await read(request, requests.Sample)
    _refuse_unsupported(body)
    if body.sampling_session_id is None:
        raise InvalidRequest("sampling_session_id is missing; create_sampling_session gives one")
    sampler = gateway.sampling.get(caller.tenant, body.sampling_session_id)
    if body.base_model or body.model_path:
        raise InvalidRequest("send sampling_session_id alone, without base_model or model_path")
    targets_NK, layout = _targets(body.target_prompt_logprobs)
    future = gateway.sampling.sample(sampler, body.seq_id, _request(body, targets_NK), layout)
    ids = [f"{future.request_id}:{index}" for index in range(body.num_samples)]
    return {"request_id": future.request_id, "sample_sequence_ids": ids, "type": "sample"}


def _refuse_unsupported(body: requests.Sample) -> None:
    if body.record_stability_info:
        raise InvalidRequest("record_stability_info is not supported; StableReinforce needs it")


def _request(body: requests.Sample, targets_NK: IntArray | None) -> SampleRequest:
    drawing = body.sampling_params
    stop_ids, stop_strings = _stop(drawing.stop)
    return SampleRequest(
        prompt_T=prompt_tokens(body.prompt),
        num_samples=body.num_samples,
        max_tokens=drawing.max_tokens,
        seed=drawing.seed,
        stop_token_ids=stop_ids,
        stop_strings=stop_strings,
        temperature=drawing.temperature,
        top_k=drawing.top_k,
        top_p=drawing.top_p,
        prompt_logprobs=bool(body.prompt_logprobs),
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        target_prompt_logprobs_NK=targets_NK,
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
    )


def _stop(
    stop: str | list[str] | list[int] | None,
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Stop ids and strings; ids None means that the base's end tokens stop.

    Strings come on top of the end tokens, a list of ids instead of them, and [] is no stop at all.
    The cookbook's role_colon renderer counts on it: its stop is a string that a base may never
    say, and it reads a sample that ended with the end token as a clean turn.
    """
    if stop is None:
        return None, ()
    if isinstance(stop, str):
        return None, (stop,)
    ids = tuple(item for item in stop if isinstance(item, int))
    strings = tuple(item for item in stop if isinstance(item, str))
    return None if strings and not ids else ids, strings


def _targets(tensor: TensorJson | None) -> tuple[IntArray | None, SparseLayout | None]:
    """Dense target ids, -1 where nothing is asked, and the layout to answer in."""
    if tensor is None:
        return None, None
    dense = from_json(tensor, "target_prompt_logprobs", Unfolding(), pad_value=-1)
    if dense.dtype.kind != "i":
        raise InvalidRequest("target_prompt_logprobs must be int64")
    layout = None
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
        layout = SparseLayout(tuple(tensor.sparse_crow_indices), tuple(tensor.sparse_col_indices))
    return dense.astype(np.int64), layout
