"""One policy's whole life through the Tinker SDK and the catalogue's routes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import tinker
from tinker import types

from tests.chaos.training import Job, digests_of, latest_of
from tests.servers import TestServer

PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Life:
    """What came of it, without the names that differ from one life to the next."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    digests: tuple[str, ...]
    latest: str
    served: str
    audit: tuple[str, ...]


def live(server: TestServer, policy: str) -> Life:
    """Create, train, save, sample, promote, load, train on, delete, start again."""
    job, losses = Job(3, "cross_entropy"), list[float]()
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = service.create_lora_training_client(
            base_model="tiny-llama", rank=2, seed=3, user_metadata={"policy": policy}
        ).result()

        def step(number: int) -> None:
            first = run.forward_backward(job.data(number), job.loss)
            update = run.optim_step(types.AdamParams(learning_rate=1e-2))
            losses.append(first.result().metrics["loss:sum"])
            update.result()

        step(0)
        step(1)
        kept = run.save_state("kept").result().path
        revision = run.save_weights_for_sampler("one").result().path
        sampler = run.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=8, seed=1, stop=[])
        drawn = sampler.sample(types.ModelInput.from_ints([504, 3575]), 1, params).result()
        promote(server, policy, digests_of(server.data, [revision])[0])
        step(2)
        with warnings.catch_warnings():  # old, and still asked for
            warnings.simplefilter("ignore", FutureWarning)
            run.load_state_with_optimizer(kept).result()
        step(3)
        gone = run.save_state("gone").result().path
        delete(server, gone)
        last = run.save_weights_for_sampler("two").result().path
        end = run.save_state("end").result().path
        run = service.create_training_client_from_state_with_optimizer(kept).result()
        step(3)
    return Life(
        tuple(losses),
        tuple(drawn.sequences[0].tokens),
        tuple(digests_of(server.data, [kept, revision, last, end])),
        latest_of(server.data, policy),
        alias_of(server, policy, "prod")["digest"],
        tuple(_audited(server, policy)),
    )


def patiently(call: Callable[[], httpx.Response]) -> httpx.Response:
    """As the SDKs do it: again after a lost connection or an answer that says so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            answer = call()
            if answer.status_code != 503 or time.monotonic() > deadline:
                return answer
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _aliases(server: TestServer, policy: str, rest: str) -> str:
    return f"{server.url}/catalog/v1/policies/default/{policy}/aliases/{rest}"


def headers_of(server: TestServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.admin_key}"}


def promote(server: TestServer, policy: str, digest: str) -> None:
    url = _aliases(server, policy, "prod/promote")
    body = {"revision": digest, "reason": "a life"}
    answer = patiently(lambda: httpx.post(url, json=body, headers=headers_of(server)))
    assert answer.status_code == 200, answer.text


def delete(server: TestServer, path: str) -> None:
    at = path.removeprefix("tinker://").split("/")
    url = f"{server.url}/api/v1/training_runs/{at[0]}/checkpoints/{at[1]}/{at[2]}"
    answer = patiently(lambda: httpx.delete(url, headers=headers_of(server)))
    # 404 to the second try: the first one's answer was lost.
    assert answer.status_code in (200, 204, 404), answer.text


def alias_of(server: TestServer, policy: str, name: str) -> dict[str, str]:
    url = f"{server.url}/catalog/v1/policies/default/{policy}/aliases"
    answer = patiently(lambda: httpx.get(url, headers=headers_of(server)))
    found: dict[str, dict[str, str]] = {alias["name"]: alias for alias in answer.json()["items"]}
    return found[name]


def _audited(server: TestServer, policy: str) -> list[str]:
    """Moves of the policy's alias, in order; repeated ones once."""
    url = _aliases(server, policy, "prod/history")
    answer = patiently(lambda: httpx.get(url, headers=headers_of(server)))
    return sorted({event["to_digest"] for event in answer.json()["items"]})
