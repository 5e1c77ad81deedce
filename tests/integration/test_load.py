"""Many clients at once: nobody gets an error, everybody gets an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.servers import TestServer

pytestmark = pytest.mark.integration

PROMPT = [504, 3575, 282, 4649, 314]
NUM_POLLS = 500


def test_64_concurrent_samples_all_answer_and_equal_one_alone(server: TestServer) -> None:
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        sampler = service.create_sampling_client(base_model=server.base).result()
        prompt = types.ModelInput.from_ints(PROMPT)
        greedy = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])
        alone = sampler.sample(prompt, 1, greedy).result().sequences[0]
        pending = [sampler.sample(prompt, 1, greedy) for _ in range(64)]
        for future in pending:
            sequence = future.result(timeout=200).sequences[0]
            np.testing.assert_array_equal(sequence.tokens, alone.tokens)


def test_500_open_long_polls_all_end_with_a_result(server: TestServer) -> None:
    answers = asyncio.run(sample_and_poll(server))
    assert len(answers) == NUM_POLLS
    assert set(answers) == {200}


async def sample_and_poll(server: TestServer) -> list[int]:
    limits = httpx.Limits(max_connections=NUM_POLLS + 20)
    headers = {"X-API-Key": server.admin_key}
    async with httpx.AsyncClient(
        base_url=f"{server.url}/api/v1", headers=headers, limits=limits, timeout=60.0
    ) as http:

        async def post(path: str, **body: Any) -> Any:
            reply = await http.post(path, json=body)
            reply.raise_for_status()
            return reply.json()

        session = (await post("/create_session", tags=[], user_metadata={}, sdk_version="0.38.0"))[
            "session_id"
        ]
        sampler = await post(
            "/create_sampling_session",
            session_id=session,
            sampling_session_seq_id=0,
            base_model=server.base,
        )
        submitted = [
            await post(
                "/asample",
                sampling_session_id=sampler["sampling_session_id"],
                seq_id=i,
                num_samples=1,
                prompt={"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
                sampling_params={"max_tokens": 6, "seed": i, "stop": []},
            )
            for i in range(NUM_POLLS)
        ]

        async def poll(request_id: str) -> int:
            while True:
                body = {"request_id": request_id, "allow_metadata_only": False}
                accept = {"Accept": "application/x-protobuf"}
                reply = await http.post("/retrieve_future", json=body, headers=accept)
                if reply.status_code != 408:
                    return reply.status_code

        return await asyncio.gather(*(poll(item["request_id"]) for item in submitted))
