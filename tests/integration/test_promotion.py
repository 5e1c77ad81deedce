"""Import, promote, serve, roll back and export over HTTP and the `openai` SDK, for real."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import safetensors.numpy

from tests.servers import TestServer

pytestmark = pytest.mark.integration

PROMPT = [{"role": "user", "content": "Say something."}]
LAYERS, WIDTH, KEYS = 30, 576, 192
ATTENTION = {"q_proj": WIDTH, "k_proj": KEYS, "v_proj": KEYS, "o_proj": WIDTH}


def peft_adapter(seed: int, rank: int = 2, scale: float = 0.3) -> tuple[dict[str, Any], bytes]:
    """A PEFT adapter of SmolLM2's attention, strong enough to change every answer."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, num_out in ATTENTION.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a = random.standard_normal((rank, WIDTH)) * scale
            b = random.standard_normal((num_out, rank)) * scale
            tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = b.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": sorted(ATTENTION),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    return config, safetensors.numpy.save(tensors)


def send_form(
    http: httpx.Client, policy: str, config: Any, weights: bytes, **fields: str
) -> httpx.Response:
    files = {
        "config": ("adapter_config.json", json.dumps(config).encode()),
        "weights": ("adapter_model.safetensors", weights),
    }
    return http.post(f"/catalog/v1/policies/{policy}/revisions", files=files, data=fields)


@pytest.fixture(scope="module")
def key(server: TestServer) -> str:
    return server.make_key("promoter", "train")


@pytest.fixture(scope="module")
def http(server: TestServer, key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: TestServer, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def digests(server: TestServer, http: httpx.Client) -> list[str]:
    """Two imported revisions of promoter/voice: one by form, one by JSON."""
    first = send_form(http, "promoter/voice", *peft_adapter(1), base=server.base)
    assert first.status_code == 201, first.text
    config, weights = peft_adapter(2)
    body = {"config": config, "weights": base64.b64encode(weights).decode()}
    second = http.post("/catalog/v1/policies/promoter/voice/revisions", json=body)
    assert second.status_code == 201, second.text
    return [first.json()["digest"], second.json()["digest"]]


def ran(client: openai.OpenAI, model: str) -> Any:
    answer = client.chat.completions.create(
        model=model, messages=PROMPT, temperature=0, max_tokens=8
    )
    return answer.model_extra["openmint"]


def move(http: httpx.Client, verb: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    path = f"/catalog/v1/policies/promoter/voice/aliases/prod/{verb}"
    return http.post(path, json=body, headers=headers)


def test_an_import_is_a_revision_that_answers(
    http: httpx.Client, client: openai.OpenAI, server: TestServer, digests: list[str]
) -> None:
    page = http.get("/catalog/v1/policies/promoter/voice/revisions").json()
    assert {item["digest"] for item in page["items"]} == set(digests)
    assert page["items"][0]["rank"] == 2 and page["items"][0]["targets"] == ["attn"]
    for model in (f"promoter/voice@{digests[0]}", f"promoter/voice@{digests[0][:30]}"):
        assert ran(client, model)["revision"] == digests[0]
    served = ran(client, "promoter/voice")
    assert served["alias"] == "latest" and served["policy"] == "promoter/voice"


def test_promote_and_roll_back_hold_for_the_next_request(
    http: httpx.Client, client: openai.OpenAI, digests: list[str]
) -> None:
    first, second = digests
    moved = move(http, "promote", {"revision": first, "reason": "passed"})
    assert moved.status_code == 200 and moved.json()["digest"] == first
    assert ran(client, "promoter/voice@prod")["revision"] == first
    stale = move(http, "promote", {"revision": second}, **{"If-Match": '"99"'})
    assert stale.status_code == 409
    move(http, "promote", {"revision": second}, **{"If-Match": moved.headers["etag"]})
    assert ran(client, "promoter/voice")["revision"] == second
    back = move(http, "rollback", {"reason": "worse"})
    assert back.json()["digest"] == first
    assert ran(client, "promoter/voice")["revision"] == first
    history = http.get("/catalog/v1/policies/promoter/voice/aliases/prod/history").json()
    actions = [event["action"] for event in history["items"]]
    assert actions == ["rollback", "promote", "promote"]
    assert history["items"][0]["reason"] == "worse"
    audit = http.get("/catalog/v1/audit").json()["items"]
    assert "alias.rollback" in [event["action"] for event in audit]


def test_a_stream_in_flight_stays_on_its_revision(
    http: httpx.Client, client: openai.OpenAI, digests: list[str]
) -> None:
    move(http, "promote", {"revision": digests[0]})
    stream = client.chat.completions.create(
        model="promoter/voice@prod", messages=PROMPT, max_tokens=40, stream=True, temperature=1
    )
    chunks = [next(iter(stream))]
    move(http, "promote", {"revision": digests[1]})
    chunks += list(stream)
    assert {chunk.model_extra["openmint"]["revision"] for chunk in chunks} == {digests[0]}
    assert ran(client, "promoter/voice@prod")["revision"] == digests[1]


def test_an_export_is_the_peft_folder_that_was_imported(
    http: httpx.Client, digests: list[str]
) -> None:
    answer = http.get(f"/catalog/v1/policies/promoter/voice/revisions/{digests[0]}/peft")
    assert answer.headers["x-openmint-revision"] == digests[0]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        config = json.loads(archive.extractfile("adapter_config.json").read())  # type: ignore[union-attr]
        weights = archive.extractfile("adapter_model.safetensors").read()  # type: ignore[union-attr]
    assert config["r"] == 2 and config["lora_alpha"] == 4
    again = send_form(http, "promoter/copy", config, weights)
    assert again.status_code == 201, again.text
    assert again.json()["digest"] == digests[0]


def test_unsafe_and_unfit_imports_are_refused(http: httpx.Client) -> None:
    config, weights = peft_adapter(3)
    pickled = send_form(http, "promoter/bad", config, pickle.dumps({"a": 1}))
    assert pickled.status_code == 415
    for broken in (b"", b"\xff" * 100, weights[:-10], weights[:50]):
        assert send_form(http, "promoter/bad", config, broken).status_code == 400
    stray = safetensors.numpy.save({"evil.weight": np.zeros((2, 2), np.float32)})
    assert send_form(http, "promoter/bad", config, stray).status_code == 400
    dora = send_form(http, "promoter/bad", {**config, "use_dora": True}, weights)
    assert dora.status_code == 400 and "use_dora" in dora.json()["detail"]
    for name in ("..", "a%00b", "A", "x" * 300):
        assert send_form(http, f"promoter/{name}", config, weights).status_code in (400, 404, 405)
    assert http.get("/catalog/v1/policies/promoter/bad").status_code == 404


def test_another_tenant_sees_nothing(server: TestServer, digests: list[str]) -> None:
    other = {"Authorization": f"Bearer {server.make_key('stranger', 'train')}"}
    for path in ("voice", "voice/revisions", f"voice/revisions/{digests[0]}/peft"):
        answer = httpx.get(f"{server.url}/catalog/v1/policies/promoter/{path}", headers=other)
        assert answer.status_code == 404
    with (
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key=other["Authorization"][7:], max_retries=0
        ) as client,
        pytest.raises(openai.NotFoundError),
    ):
        ran(client, "promoter/voice@prod")


def test_roles_bound_what_a_key_may_do(server: TestServer, digests: list[str]) -> None:
    def status(role: str, method: str, path: str, body: Any = None) -> int:
        headers = {"Authorization": f"Bearer {server.make_key('promoter', role)}"}
        url = f"{server.url}{path}"
        return httpx.request(method, url, headers=headers, json=body, timeout=60).status_code

    chat = {"model": server.base, "messages": PROMPT, "max_tokens": 1}
    promote = "/catalog/v1/policies/promoter/voice/aliases/canary/promote"
    assert status("read", "GET", "/catalog/v1/policies") == 200
    assert status("read", "POST", "/v1/chat/completions", chat) == 403
    assert status("serve", "POST", "/v1/chat/completions", chat) == 200
    assert status("serve", "POST", promote, {"revision": digests[0]}) == 403
    assert status("train", "POST", promote, {"revision": digests[0]}) == 200
    assert status("train", "GET", "/catalog/v1/keys") == 403
    assert status("admin", "GET", "/catalog/v1/keys") == 200


def test_an_admin_makes_and_revokes_keys(server: TestServer) -> None:
    admin = {"Authorization": f"Bearer {server.admin_key}"}
    with httpx.Client(base_url=server.url, headers=admin, timeout=30) as http:
        made = http.post("/catalog/v1/keys", json={"tenant": "newcomer", "role": "read"}).json()
        theirs = {"Authorization": f"Bearer {made['key']}"}
        assert httpx.get(f"{server.url}/v1/models", headers=theirs).status_code == 200
        assert "newcomer" in [t["tenant"] for t in http.get("/catalog/v1/tenants").json()["items"]]
        assert http.delete(f"/catalog/v1/keys/newcomer/{made['key_id']}").status_code == 204
        assert httpx.get(f"{server.url}/v1/models", headers=theirs).status_code == 401


def test_a_named_revision_cannot_be_deleted(http: httpx.Client, digests: list[str]) -> None:
    path = f"/catalog/v1/policies/promoter/copy/revisions/{digests[0]}"
    assert http.delete(path).status_code == 409
    send_form(http, "promoter/copy", *peft_adapter(4))
    assert http.delete(path).status_code == 204
    assert http.get(path).status_code == 404


def test_lists_continue_by_cursor(http: httpx.Client, digests: list[str]) -> None:
    path = "/catalog/v1/policies/promoter/voice/revisions"
    first = http.get(path, params={"limit": 1}).json()
    rest = http.get(path, params={"limit": 1, "cursor": first["next_cursor"]}).json()
    assert [first["items"][0]["number"], rest["items"][0]["number"]] == [2, 1]
    assert http.get(path, params={"cursor": "../x"}).status_code == 400
    found = http.get("/catalog/v1/policies", params={"search": "oic"}).json()["items"]
    assert [item["name"] for item in found] == ["voice"]
