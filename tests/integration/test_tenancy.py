"""Quotas and usage of tenants over HTTP, through both SDKs' routes."""

import httpx
import pytest
import tinker
from tinker import types

from tests.servers import run_cli, run_cli_json

pytestmark = pytest.mark.integration

TOKENS = [504, 3575, 282, 4649, 314, 7042]


def datum():
    return types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * 5},
    )


class Admin:
    def __init__(self, server):
        self.arguments = ["--url", server.url, "--key", server.admin_key]

    def set_quota(self, tenant, **most):
        options = [f"--{name.replace('_', '-')}={value}" for name, value in most.items()]
        run_cli("quota", "set", tenant, *options, *self.arguments)

    def usage(self, tenant):
        return run_cli_json("usage", "--tenant", tenant, *self.arguments)


@pytest.fixture
def admin(server):
    return Admin(server)


def client_of(server, key):
    return httpx.Client(base_url=server.url, headers={"X-API-Key": key}, timeout=60.0)


def refused(answer, what):
    assert answer.status_code == 429, answer.text
    assert what in answer.text
    assert int(answer.headers["Retry-After"]) >= 1


def test_requests_over_the_quota_are_429_for_that_tenant_alone(server, admin):
    admin.set_quota("hasty", requests_per_minute=3)
    with client_of(server, server.make_key("hasty", "read")) as http:
        answers = [http.get("/v1/models") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    refused(answers[-1], "3 requests a minute")
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"
    with client_of(server, server.make_key("calm", "read")) as http:
        assert http.get("/v1/models").status_code == 200


def test_tokens_adapters_and_bytes_have_limits_of_their_own(server, admin):
    key = server.make_key("thrifty", "train")
    with (
        tinker.ServiceClient(base_url=server.url, api_key=key) as service,
        client_of(server, key) as http,
    ):
        run = service.create_lora_training_client(server.base, rank=1, seed=1).result()
        run.forward_backward([datum()], "cross_entropy").result()
        path = run.save_weights_for_sampler("one").result().path
        model_id = path.removeprefix("tinker://").split("/")[0]
        session_id = model_id.split(":")[0]

        admin.set_quota("thrifty", resident_adapters=1)
        another = {"session_id": session_id, "model_seq_id": 9, "base_model": server.base}
        refused(http.post("/api/v1/create_model", json=another), "1 adapters resident")

        admin.set_quota("thrifty", stored_bytes=1)
        save = {"model_id": model_id, "seq_id": 90, "path": "two"}
        refused(http.post("/api/v1/save_weights", json=save), "of 1 bytes")

        admin.set_quota("thrifty", tokens_per_minute=10)
        ask = {"model": server.base, "prompt": TOKENS, "max_tokens": 8}
        assert http.post("/v1/completions", json=ask).status_code == 200
        refused(http.post("/v1/completions", json=ask), "10 tokens a minute")
        run_cli("quota", "clear", "thrifty", *admin.arguments)
        assert http.post("/v1/completions", json=ask).status_code == 200


def test_usage_is_what_was_trained_read_and_drawn(server, admin):
    key = server.make_key("metered", "train")
    with (
        tinker.ServiceClient(base_url=server.url, api_key=key) as service,
        client_of(server, key) as http,
    ):
        run = service.create_lora_training_client(server.base, rank=1, seed=1).result()
        for _ in range(3):
            run.forward_backward([datum(), datum()], "cross_entropy").result()
        run.forward([datum()], "cross_entropy").result()
        run.optim_step(types.AdamParams()).result()
        run.save_state("kept").result()
        sampler = service.create_sampling_client(base_model=server.base).result()
        params = types.SamplingParams(max_tokens=4, stop=[])
        sampler.sample(types.ModelInput.from_ints(TOKENS), 3, params).result()
        wait_for(lambda: sum(hour["sampled_tokens"] for hour in admin.usage("metered")) == 12)
        # Workers say about every second how long they computed for whom.
        wait_for(lambda: sum(hour["engine_seconds"] for hour in admin.usage("metered")) > 0.0)
        hours = admin.usage("metered")
        total = {name: sum(hour[name] for hour in hours) for name in hours[0] if name[-1] == "s"}
        assert total["trained_tokens"] == 3 * 10 + 5
        assert total["prompt_tokens"] + total["cached_tokens"] == len(TOKENS)
        assert total["checkpoints"] == 1
        assert 0.0 < total["engine_seconds"] < 60.0
        window = {"starting_on": "2020-01-01T00:00:00Z", "ending_before": "2100-01-01T00:00:00Z"}
        events = http.get("/api/v1/billing/usage/events", params=window).json()["data"]
    drawn = [e["event_info"] for e in events if e["event_info"]["type"] == "sampling_sample"]
    assert sum(each["token_count"] for each in drawn) == 12
    assert {event["user_name"] for event in events} == {"metered"}


def wait_for(holds, seconds=20.0):
    """Usage is written every few seconds."""
    import time

    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.3)
