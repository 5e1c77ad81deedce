"""From training to traffic through the unmodified `tinker` and `openai` clients, on both databases
and both stores.

A gate blocks a worse revision, a canary shifts traffic and gives it back, a rollback under load
loses nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker
from tinker import types

from tests.chaos.training import Job
from tests.postgres import PostgresServer
from tests.s3 import S3Server
from tests.servers import (
    TestServer,
    gateway_of,
    run_cli,
    run_cli_json,
    running_server,
    wait_until_ready,
)

pytestmark = pytest.mark.integration

POLICY = "default/support"
PATH = f"/catalog/v1/policies/{POLICY}"
JOB = Job(3, "cross_entropy")
PROMPTS = [f"Tell me about {thing} and" for thing in ("rain", "bread", "ships", "snow", "glass")]
CLIENTS = [f"client-{i}" for i in range(60)]
NUM_LOADERS = 6


@dataclass
class Traffic:
    """A server with a policy that was trained well, then badly."""

    server: TestServer
    openai: openai.OpenAI
    http: httpx.Client
    good: str
    bad: str

    @property
    def env(self) -> dict[str, str]:
        return {"OPENMINT_URL": self.server.url, "OPENMINT_API_KEY": self.server.admin_key}

    def cli(self, *arguments: str) -> Any:
        return run_cli_json(*arguments, environ=self.env)

    def ran(self, client: str | None = None, model: str = POLICY) -> str:
        """The revision that answers a request of this client."""
        more: dict[str, Any] = {"user": client} if client else {}
        answer = self.openai.completions.create(
            model=model, prompt=PROMPTS[0], max_tokens=1, temperature=0, **more
        )
        return str(answer.model_extra["openmint"]["revision"])  # type: ignore[index]

    def on_canary(self) -> set[str]:
        with ThreadPoolExecutor(8) as pool:
            ran = dict(zip(CLIENTS, pool.map(self.ran, CLIENTS), strict=True))
        assert set(ran.values()) <= {self.good, self.bad}
        return {client for client, revision in ran.items() if revision == self.bad}

    def text(self, model: str, prompt: str, max_tokens: int) -> str:
        answer = self.openai.completions.create(
            model=model, prompt=prompt, max_tokens=max_tokens, temperature=0
        )
        return answer.choices[0].text

    def history(self) -> list[dict[str, Any]]:
        return list(self.http.get(f"{PATH}/aliases/prod/history").json()["items"])


def train(server: TestServer) -> tuple[str, str]:
    """Digests of a revision, and of one that many wild steps made of it."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = service.create_lora_training_client(
            "tiny-llama", 4, seed=1, user_metadata={"policy": "support"}
        ).result()
        for name, rate, steps in (("good", 1e-3, 1), ("bad", 0.3, 4)):
            for step in range(steps):
                run.forward_backward(JOB.data(step), JOB.loss).result()
                run.optim_step(types.AdamParams(learning_rate=rate)).result()
            run.save_weights_for_sampler(name).result()
    headers = {"X-API-Key": server.admin_key}
    page = httpx.get(f"{server.url}{PATH}/revisions", headers=headers).json()
    bad, good = (item["digest"] for item in page["items"])
    return good, bad


@pytest.fixture(scope="module", params=["sqlite and a folder", "postgresql and s3"])
def environ(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Of a server with this database and this store."""
    if request.param == "sqlite and a folder":
        yield {}
        return
    s3: S3Server = request.getfixturevalue("s3")
    postgres: PostgresServer = request.getfixturevalue("postgres")
    with postgres.new_database() as url:
        places = {"OPENMINT_DATABASE_URL": url, "OPENMINT_STORE_URL": s3.new_url()}
        yield {**s3.environ(), **places}


@pytest.fixture(scope="module")
def traffic(
    environ: dict[str, str],
    tiny_base: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Traffic]:
    root = tmp_path_factory.mktemp("traffic")
    with running_server(root, bases=[str(tiny_base("llama"))], environ=environ) as server:
        good, bad = train(server)
        key = server.admin_key
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=2) as client,
            httpx.Client(base_url=server.url, headers={"X-API-Key": key}, timeout=60) as http,
        ):
            yield Traffic(server, client, http, good, bad)


def test_a_gate_blocks_a_worse_revision(traffic: Traffic) -> None:
    good, bad = f"{POLICY}@{traffic.good}", f"{POLICY}@{traffic.bad}"
    traffic.cli("promote", good, "--yes")
    items = [{"prompt": prompt, "answer": traffic.text(good, prompt, 8)} for prompt in PROMPTS]
    assert all(item["answer"].strip() for item in items)
    task = {"name": "as-before", "scorer": "exact", "max_tokens": 8, "items": items}
    assert traffic.http.post("/catalog/v1/tasks", json=task).status_code == 201
    traffic.cli("gate", "add", POLICY, "--task", "as-before", "--min-score", "0.8")
    traffic.cli("gate", "add", POLICY, "--task", "as-before", "--margin", "0.4")
    assert len(traffic.cli("gate", "list", POLICY)) == 2

    refused = run_cli("promote", bad, "--yes", environ=traffic.env, code=4)
    assert f"openmint evaluate {bad} --task as-before" in refused.stderr
    promote = f"{PATH}/aliases/prod/promote"
    answer = traffic.http.post(promote, json={"revision": traffic.bad})
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:openmint:error:gate_failed")
    commands = {command for failure in answer.json()["failures"] for command in failure["run"]}
    assert commands == {f"openmint evaluate {model} --task as-before" for model in (good, bad)}
    for command in sorted(commands):
        traffic.cli(*command.split()[1:])

    failures = traffic.http.post(promote, json={"revision": traffic.bad}).json()["failures"]
    assert [failure["run"] for failure in failures] == [[], []]
    assert failures[0]["score"] < 0.8 and failures[1]["bound"] < -0.4
    assert traffic.ran() == traffic.good
    same_answers = traffic.cli("promote", good, "--alias", "prod", "--yes")
    assert same_answers["digest"] == traffic.good


def test_each_new_revision_is_evaluated_by_itself(traffic: Traffic) -> None:
    """`latest` names the badly trained revision; the schedule finds out."""
    traffic.cli("schedule", "add", POLICY, "--task", "as-before", "--n", "2")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = traffic.http.get("/catalog/v1/evaluations", params={"task": "as-before"}).json()
        newest = found["items"][0]
        if newest["n"] == 2 and newest["status"] == "finished":
            break
        time.sleep(0.5)
    assert (newest["revision"], newest["n"]) == (traffic.bad, 2)
    assert newest["score"] < 1
    (schedule,) = traffic.cli("schedule", "list", POLICY)
    assert schedule["last_digest"] == traffic.bad


def test_a_canary_shifts_traffic_and_gives_it_back(traffic: Traffic) -> None:
    bad = f"{POLICY}@{traffic.bad}"
    traffic.cli("canary", "start", bad, "--share", "0.2", "--yes", "--reason", "a try")
    few = traffic.on_canary()
    assert 2 <= len(few) <= 26
    traffic.cli("canary", "share", POLICY, "--share", "0.6", "--yes")
    more = traffic.on_canary()
    assert few < more < set(CLIENTS)
    gateway_of(traffic.server).kill()
    wait_until_ready(traffic.server)
    assert traffic.on_canary() == more
    assert {traffic.ran() for _ in range(30)} == {traffic.good, traffic.bad}

    run_cli("canary", "finish", POLICY, "--yes", environ=traffic.env, code=4)
    aborted = traffic.cli("canary", "abort", POLICY, "--yes", "--reason", "worse")
    assert (aborted["digest"], aborted["canary"]) == (traffic.good, None)
    assert traffic.on_canary() == set()
    told = [(event["action"], event["share"]) for event in traffic.history()[:3]]
    assert told == [("canary_abort", None), ("canary_share", 0.6), ("canary_start", 0.2)]


def test_a_canary_that_clients_dislike_is_aborted(traffic: Traffic) -> None:
    """Clients report what they thought of the revision that each answer names."""
    bad = f"{POLICY}@{traffic.bad}"
    watch = traffic.cli(
        "watch", "add", POLICY, "--metric", "liked", "--at-least", "0.7", "--min-observations", "8"
    )
    traffic.cli("canary", "start", bad, "--share", "0.5", "--yes")
    time.sleep(5.1)  # observations count from the next span on
    made = traffic.http.post("/catalog/v1/keys", json={"tenant": "default", "role": "serve"})
    serve = {"X-API-Key": made.json()["key"]}
    for client in CLIENTS:
        revision = traffic.ran(client)
        liked = float(revision == traffic.good)
        item = {"policy": "support", "revision": revision, "metric": "liked", "value": liked}
        report = {"items": [item]}
        answer = traffic.http.post("/catalog/v1/observations", json=report, headers=serve)
        assert answer.status_code == 200, answer.text
        if traffic.history()[0]["action"] == "canary_abort":
            break
    event = traffic.history()[0]
    assert (event["action"], event["actor"]) == ("canary_abort", f"watch:{watch['watch_id']}")
    assert "liked of at least 0.7" in event["reason"]
    assert traffic.on_canary() == set()
    (listed,) = traffic.cli("watch", "list", POLICY)
    assert [found["revision"] for found in listed["revisions"]] == [traffic.good]
    assert "openmint_watch_actions_total" in traffic.http.get("/metrics").text
    assert '"watch_failed"' in traffic.server.log.read_text()


@dataclass(frozen=True)
class Streamed:
    """An answer under load; times are of this process's clock."""

    asked_at: float
    ended_at: float
    revisions: frozenset[str]
    text: str


def stream_until(traffic: Traffic, prompt: str, stop: threading.Event) -> list[Streamed]:
    answers = []
    while not stop.is_set():
        asked_at, revisions, text = time.monotonic(), set(), ""
        for chunk in traffic.openai.completions.create(
            model=POLICY, prompt=prompt, max_tokens=24, temperature=0, stream=True
        ):
            revisions.add(chunk.model_extra["openmint"]["revision"])  # type: ignore[index]
            text += chunk.choices[0].text
        answers.append(Streamed(asked_at, time.monotonic(), frozenset(revisions), text))
    return answers


def test_a_rollback_under_load_loses_nothing(traffic: Traffic) -> None:
    """Every answer is whole, named rightly, and the text of the revision that it names."""
    bad = f"{POLICY}@{traffic.bad}"
    traffic.cli("promote", bad, "--yes", "--override", "to be rolled back")
    assert traffic.history()[0]["override_reason"] == "to be rolled back"
    prompt = PROMPTS[1]
    texts = {
        revision: traffic.text(f"{POLICY}@{revision}", prompt, 24)
        for revision in (traffic.good, traffic.bad)
    }
    assert texts[traffic.good] != texts[traffic.bad]
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_LOADERS) as pool:
        loads = [pool.submit(stream_until, traffic, prompt, stop) for _ in range(NUM_LOADERS)]
        time.sleep(2.0)
        called_at = time.monotonic()
        moved = traffic.http.post(f"{PATH}/aliases/prod/rollback", json={"reason": "worse"})
        returned_at = time.monotonic()
        time.sleep(2.0)
        stop.set()
        answers = [answer for load in loads for answer in load.result(timeout=60)]
    assert moved.json()["digest"] == traffic.good
    for answer in answers:
        (revision,) = answer.revisions
        assert answer.text == texts[revision]
        assert revision == traffic.good or answer.asked_at < returned_at
        assert revision == traffic.bad or answer.ended_at > called_at
    old = [answer for answer in answers if answer.revisions == {traffic.bad}]
    assert 0 < len(old) < len(answers)
    last = max(answer.ended_at for answer in old) - called_at
    running = sum(answer.asked_at < called_at < answer.ended_at for answer in answers)
    print(
        f"\nrollback under {NUM_LOADERS} streams: {len(answers)} answers, {running} running at the "
        f"call, which took {1e3 * (returned_at - called_at):.1f} ms; last token of the old "
        f"revision {1e3 * last:.1f} ms after the call"
    )
