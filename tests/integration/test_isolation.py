"""Who may do what: every route x {no key, unknown, revoked, expired, each role, another tenant}.

`ROWS` has a row for each route of the application, or the first test fails; a row says who may
call it, with a request that names the owner's things.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from openmint.api.app import ROUTERS
from openmint.catalog.records import ROLES
from tests.conftest import PROJECT
from tests.integration.test_promotion import peft_adapter, send_form
from tests.servers import TestServer

pytestmark = pytest.mark.integration

OWNER, OTHER = "isolated", "curious"
UNKNOWN = "tml-om_000000000000_" + "x" * 43
DENIED = {401, 403, 404}
POLICY = f"{OWNER}/kept"
CATALOG = "/catalog/v1/policies/{tenant}/{name}"
CHECKPOINT = "/api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}"
PAGE = (PROJECT / "docs" / "api.md").read_text("utf-8")
PARAMETER = re.compile(r"{(\w+)}")


class World:
    """The owner's things, made over HTTP on a real server, and everyone's keys."""

    def __init__(self, server: TestServer) -> None:
        self.http = httpx.Client(base_url=server.url, timeout=60.0)
        self.base, self.admin = server.base, server.admin_key
        self.numbers = itertools.count(100)
        self.keys = {role: self.make_key(OWNER, role) for role in ROLES}
        self.other = {role: self.make_key(OTHER, role) for role in ROLES if role != "admin"}
        self.expired = self.make_key(OWNER, "admin", ttl_seconds=1)
        self.revoked = self.make_key(OWNER, "admin")
        self.revoke(self.revoked)
        self._make_things()
        time.sleep(1.1)  # the expired key's second

    def ask(self, method: str, path: str, key: str, **options: Any) -> httpx.Response:
        headers = {"X-API-Key": key} if key else {}
        return self.http.request(method, path, headers=headers, **options)

    def tinker(self, name: str, **body: Any) -> dict[str, Any]:
        """A Tinker call of the owner's that must succeed."""
        answer = self.ask("POST", f"/api/v1/{name}", self.keys["train"], json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def result(self, name: str, **body: Any) -> dict[str, Any]:
        """The result of a Tinker call that opens a future."""
        request_id = self.tinker(name, **body)["request_id"]
        while (answer := self.future(request_id)).status_code == 408:
            pass
        assert "error" not in answer.json(), answer.text
        return dict(answer.json())

    def future(self, request_id: str) -> httpx.Response:
        body = {"request_id": request_id}
        return self.ask("POST", "/api/v1/retrieve_future", self.keys["train"], json=body)

    def make_key(self, tenant: str, role: str, **more: Any) -> str:
        body = {"tenant": tenant, "role": role, **more}
        answer = self.ask("POST", "/catalog/v1/keys", self.admin, json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["key"])

    def revoke(self, key: str) -> None:
        path = f"/catalog/v1/keys/{OWNER}/{key.split('_')[1]}"
        assert self.ask("DELETE", path, self.admin).status_code == 204

    def make_session(self) -> str:
        return str(self.tinker("create_session")["session_id"])

    def name(self) -> str:
        """One that no checkpoint has yet."""
        return f"n{next(self.numbers)}"

    def save(self) -> str:
        """The name of a new sampler checkpoint."""
        name = self.name()
        self.result("save_weights_for_sampler", model_id=self.run, path=name)
        return name

    def make_alias(self) -> str:
        """A new alias with a canary."""
        name = self.name()
        path = f"/catalog/v1/policies/{POLICY}/aliases/{name}"
        for verb, call, body in (
            ("POST", "promote", {"revision": self.digest}),
            ("PUT", "canary", {"revision": self.second, "share": 0.5}),
        ):
            answer = self.ask(verb, f"{path}/{call}", self.keys["train"], json=body)
            assert answer.status_code == 200, answer.text
        return name

    def make_schedule(self) -> int:
        """The id of a new schedule, on an alias that names nothing."""
        path = f"/catalog/v1/policies/{POLICY}/aliases/held/schedules"
        answer = self.ask("POST", path, self.keys["train"], json={"task": "isolation"})
        assert answer.status_code == 201, answer.text
        return int(answer.json()["schedule_id"])

    def make_watch(self) -> int:
        """The id of a new watch, on an alias of its own."""
        path = f"/catalog/v1/policies/{POLICY}/aliases/held/watches"
        answer = self.ask("POST", path, self.keys["train"], json=WATCH)
        assert answer.status_code == 201, answer.text
        return int(answer.json()["watch_id"])

    def make_gate(self) -> int:
        """The id of a new gate, on an alias of its own."""
        path = f"/catalog/v1/policies/{POLICY}/aliases/held/gates"
        answer = self.ask("POST", path, self.keys["train"], json=GATE)
        assert answer.status_code == 201, answer.text
        return int(answer.json()["gate_id"])

    def things(self) -> list[str]:
        """What no other tenant may ever read."""
        return [self.session, self.run, self.digest, self.sample, POLICY]

    def _make_things(self) -> None:
        self.session = self.make_session()
        self.run = f"{self.session}:train:0"
        self.result(
            "create_model",
            session_id=self.session,
            model_seq_id=0,
            base_model=self.base,
            lora_config=SMALL,
            user_metadata={"policy": "kept"},
        )
        named = {"model_id": self.run}
        self.weights = self.result("save_weights", **named, seq_id=1, path="w")["path"]
        self.result("save_weights_for_sampler", **named, seq_id=2, path="s")
        self.result("save_weights_external", **named, seq_id=3, path="e")
        self.sampler = self.tinker(
            "create_sampling_session",
            session_id=self.session,
            sampling_session_seq_id=0,
            base_model=self.base,
        )["sampling_session_id"]
        self.sample = self.tinker("asample", **sample_of(self))["request_id"]
        headers = {"X-API-Key": self.keys["train"]}
        with httpx.Client(base_url=self.http.base_url, headers=headers) as form:
            made = [send_form(form, POLICY, *peft_adapter(i), base=self.base) for i in (6, 5)]
        assert [answer.status_code for answer in made] == [201, 201], made[-1].text
        self.second, self.digest = (answer.json()["digest"] for answer in made)
        for reference in (self.digest, "latest"):
            path = f"/catalog/v1/policies/{POLICY}/aliases/prod/promote"
            answer = self.ask("POST", path, self.keys["train"], json={"revision": reference})
            assert answer.status_code in (200, 201), answer.text
        task = self.ask("POST", "/catalog/v1/tasks", self.keys["train"], json=TASK)
        assert task.status_code == 201, task.text
        started = self.ask("POST", "/catalog/v1/evaluations", self.keys["train"], json=EVALUATION)
        assert started.status_code == 202, started.text
        self.evaluation = started.json()["evaluation_id"]
        path = f"/catalog/v1/policies/{POLICY}/aliases/held/watches"
        seen = {"metric": "seen", "at_least": 0.1}
        assert self.ask("POST", path, self.keys["train"], json=seen).status_code == 201


SMALL = {"rank": 1, "train_unembed": False}
LOSS = {
    "data": [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
            },
        }
    ],
    "loss_fn": "cross_entropy",
}
TASK = {
    "name": "isolation",
    "items": [{"prompt": "Say yes.", "answer": "yes"}],
    "scorer": "contains",
    "max_tokens": 2,
}
EVALUATION = {"model": POLICY, "task": "isolation"}
GATE = {"task": "isolation", "min_score": 0.5}
WATCH = {"metric": "thumbs", "at_least": 0.5}

Body = Callable[[World], Any]


@dataclass(frozen=True)
class Row:
    """A route's access, and a request to it that is right for the owner."""

    roles: tuple[str, ...] | None
    """Besides admin, who may do everything; None: nobody needs a key."""
    body: Body | None = None
    """Its JSON."""
    at: Mapping[str, Body] = field(default_factory=dict)
    """What its path names, where `path_of` says something else."""
    params: Body | None = None
    foreign: int | None = 404
    """What another tenant gets that names the owner's things; None: it names none."""
    spends_key: bool = False
    """Whether the key is of no use afterwards."""


def sample_of(world: World) -> dict[str, Any]:
    chunk = {"type": "encoded_text", "tokens": [1, 2, 3]}
    params = {"max_tokens": 1}
    return {
        "sampling_session_id": world.sampler,
        "prompt": {"chunks": [chunk]},
        "sampling_params": params,
    }


def of_run(world: World) -> dict[str, Any]:
    return {"model_id": world.run}


SAVED: dict[str, Body] = {"segment": lambda w: "sampler_weights", "name": lambda w: "s"}
HELD: dict[str, Body] = {"alias": lambda w: "held"}
ANY = ("read", "serve", "train")
USE = ("serve", "train")
TRAIN = ("train",)
SAID = {
    "none": None,
    "link": None,
    "any key": ANY,
    "read": ANY,
    "serve": USE,
    "train": TRAIN,
    "admin": (),
}
"""Roles as docs/api.md says them."""

ROWS: dict[str, Row] = {
    # -- open to everyone
    "GET /healthz": Row(None),
    "GET /api/v1/healthz": Row(None),
    "GET /readyz": Row(None),
    "GET /metrics": Row(None),
    "POST /api/v1/client/config": Row(None),
    "POST /api/v1/client/dynamic_config": Row(None),
    # -- open, but their path holds a signed token
    "GET /api/v1/traces/{session_id}/{token}": Row(None),
    "GET /api/v1/files/{digest}/{file}/{token}": Row(None),
    # -- the key itself
    "POST /api/v1/auth/token": Row(ANY, foreign=None),
    "GET /api/v1/auth/apikey/me": Row(ANY, foreign=None),
    "DELETE /api/v1/auth/apikey/me": Row(ANY, foreign=None, spends_key=True),
    # -- sessions
    "GET /api/v1/get_server_capabilities": Row(ANY, foreign=None),
    "POST /api/v1/telemetry": Row(ANY, foreign=None),
    "POST /api/v1/create_session": Row(USE, lambda w: {}, foreign=None),
    "POST /api/v1/session_heartbeat": Row(USE, lambda w: {"session_id": w.session}),
    "POST /api/v1/sessions/search": Row(ANY, lambda w: {}, foreign=None),
    "GET /api/v1/sessions": Row(ANY, foreign=None),
    "GET /api/v1/sessions/{session_id}": Row(ANY),
    "POST /api/v1/sessions/{session_id}/finish": Row(
        USE, lambda w: {}, at={"session_id": World.make_session}
    ),
    "PUT /api/v1/sessions/{session_id}/project": Row(TRAIN, lambda w: {"project_id": "p"}),
    "GET /api/v1/sessions/{session_id}/trace_export": Row(ANY),
    "GET /api/v1/audit": Row((), foreign=None),
    "GET /api/v1/billing/usage/events": Row(
        ANY,
        params=lambda w: {"starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-01-02"},
        foreign=None,
    ),
    "GET /api/v1/billing/usage/checkpoints/current": Row(ANY, foreign=None),
    # -- training
    "POST /api/v1/create_model": Row(
        TRAIN,
        lambda w: {
            "session_id": w.session,
            "model_seq_id": next(w.numbers),
            "base_model": w.base,
            "lora_config": SMALL,
        },
    ),
    "POST /api/v1/get_info": Row(ANY, of_run),
    "POST /api/v1/forward_backward": Row(
        TRAIN, lambda w: {**of_run(w), "forward_backward_input": LOSS}
    ),
    "POST /api/v1/forward": Row(TRAIN, lambda w: {**of_run(w), "forward_input": LOSS}),
    "POST /api/v1/optim_step": Row(TRAIN, of_run),
    # -- checkpoints
    "POST /api/v1/save_weights": Row(TRAIN, lambda w: {**of_run(w), "path": w.name()}),
    "POST /api/v1/save_weights_for_sampler": Row(TRAIN, lambda w: {**of_run(w), "path": w.name()}),
    "POST /api/v1/save_weights_external": Row(TRAIN, lambda w: {**of_run(w), "path": w.name()}),
    "POST /api/v1/load_weights": Row(TRAIN, lambda w: {**of_run(w), "path": w.weights}),
    "POST /api/v1/weights_info": Row(ANY, lambda w: {"tinker_path": w.weights}),
    "POST /api/v1/copy_weights": Row(
        TRAIN, lambda w: {"source_path": w.weights, "destination_project_id": "p"}
    ),
    "GET /api/v1/training_runs": Row(ANY, foreign=None),
    "GET /api/v1/training_runs/{run_id}": Row(ANY),
    "GET /api/v1/training_runs/{run_id}/checkpoints": Row(ANY),
    "GET /api/v1/checkpoints": Row(ANY, foreign=None),
    f"DELETE {CHECKPOINT}": Row(TRAIN, at={**SAVED, "name": lambda w: w.save()}),
    f"POST {CHECKPOINT}/publish": Row(TRAIN, at={**SAVED, "name": lambda w: w.save()}),
    f"DELETE {CHECKPOINT}/publish": Row(TRAIN, at=SAVED),
    f"PUT {CHECKPOINT}/ttl": Row(TRAIN, lambda w: {"ttl_seconds": None}, at=SAVED),
    f"GET {CHECKPOINT}/external_weights_urls": Row(
        ANY, at={"segment": lambda w: "external_weights", "name": lambda w: "e"}
    ),
    # -- sampling
    "POST /api/v1/create_sampling_session": Row(
        USE,
        lambda w: {
            "session_id": w.session,
            "sampling_session_seq_id": next(w.numbers),
            "base_model": w.base,
        },
    ),
    "GET /api/v1/samplers/{sampler_id}": Row(ANY),
    "POST /api/v1/join_sampling_session": Row(USE, lambda w: {"sampling_session_id": w.sampler}),
    "POST /api/v1/asample": Row(USE, sample_of),
    "POST /api/v1/retrieve_future": Row(USE, lambda w: {"request_id": w.sample}, foreign=410),
    "POST /api/v1/retrieve_futures": Row(
        USE,
        lambda w: {
            "target": {"type": "sampling_session", "sampling_session_id": w.sampler},
            "timeout": 0.0,
        },
    ),
    "POST /api/v1/cancel_future": Row(USE, lambda w: {"request_id": w.sample}, foreign=410),
    # -- OpenAI
    "GET /v1/models": Row(ANY, foreign=None),
    "GET /v1/models/{model}": Row(ANY),
    "POST /v1/chat/completions": Row(
        USE,
        lambda w: {
            "model": POLICY,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        },
    ),
    "POST /v1/completions": Row(USE, lambda w: {"model": POLICY, "prompt": "Hi", "max_tokens": 1}),
    # -- catalogue
    "GET /catalog/v1/policies": Row(ANY, params=lambda w: {"tenant": OWNER}),
    f"GET {CATALOG}": Row(ANY),
    f"GET {CATALOG}/revisions": Row(ANY),
    f"POST {CATALOG}/revisions": Row(
        TRAIN, lambda w: {"base": w.base, "config": {}, "weights": "AAAA"}
    ),
    "GET /catalog/v1/revisions": Row(ANY, params=lambda w: {"tenant": OWNER}),
    f"PUT {CATALOG}/tags/{{tag}}": Row(TRAIN),
    f"DELETE {CATALOG}/tags/{{tag}}": Row(TRAIN),
    f"PUT {CATALOG}/revisions/{{reference}}/tags/{{tag}}": Row(TRAIN),
    f"DELETE {CATALOG}/revisions/{{reference}}/tags/{{tag}}": Row(TRAIN),
    f"GET {CATALOG}/retention": Row(ANY),
    f"PUT {CATALOG}/retention": Row(TRAIN, lambda w: {}),
    "GET /catalog/v1/garbage": Row((), foreign=None),
    "POST /catalog/v1/imports": Row(TRAIN, lambda w: {}, params=lambda w: {"tenant": OWNER}),
    f"GET {CATALOG}/revisions/{{reference}}": Row(ANY),
    f"DELETE {CATALOG}/revisions/{{reference}}": Row(TRAIN),
    f"GET {CATALOG}/revisions/{{reference}}/lineage": Row(ANY),
    f"GET {CATALOG}/revisions/{{reference}}/descendants": Row(ANY),
    f"GET {CATALOG}/revisions/{{reference}}/peft": Row(ANY),
    f"GET {CATALOG}/aliases": Row(ANY),
    f"GET {CATALOG}/aliases/{{alias}}/history": Row(ANY),
    f"POST {CATALOG}/aliases/{{alias}}/promote": Row(TRAIN, lambda w: {"revision": w.digest}),
    f"POST {CATALOG}/aliases/{{alias}}/rollback": Row(TRAIN, lambda w: {}),
    f"PUT {CATALOG}/aliases/{{alias}}/canary": Row(
        TRAIN, lambda w: {"share": 0.6}, at={"alias": World.make_alias}
    ),
    f"POST {CATALOG}/aliases/{{alias}}/canary/finish": Row(
        TRAIN, lambda w: {}, at={"alias": World.make_alias}
    ),
    f"POST {CATALOG}/aliases/{{alias}}/canary/abort": Row(
        TRAIN, lambda w: {}, at={"alias": World.make_alias}
    ),
    f"GET {CATALOG}/aliases/{{alias}}/watches": Row(ANY),
    f"POST {CATALOG}/aliases/{{alias}}/watches": Row(TRAIN, lambda w: WATCH, at=HELD),
    f"DELETE {CATALOG}/aliases/{{alias}}/watches/{{watch_id}}": Row(
        TRAIN, at={**HELD, "watch_id": World.make_watch}
    ),
    f"GET {CATALOG}/aliases/{{alias}}/schedules": Row(ANY),
    f"POST {CATALOG}/aliases/{{alias}}/schedules": Row(
        TRAIN, lambda w: {"task": "isolation"}, at=HELD
    ),
    f"DELETE {CATALOG}/aliases/{{alias}}/schedules/{{schedule_id}}": Row(
        TRAIN, at={**HELD, "schedule_id": World.make_schedule}
    ),
    "POST /catalog/v1/observations": Row(
        USE,
        lambda w: {
            "items": [{"policy": "kept", "metric": "seen", "revision": w.digest, "value": 1.0}]
        },
    ),
    f"GET {CATALOG}/aliases/{{alias}}/gates": Row(ANY),
    f"POST {CATALOG}/aliases/{{alias}}/gates": Row(TRAIN, lambda w: GATE, at=HELD),
    f"DELETE {CATALOG}/aliases/{{alias}}/gates/{{gate_id}}": Row(
        TRAIN, at={**HELD, "gate_id": World.make_gate}
    ),
    "GET /catalog/v1/pins": Row(ANY, params=lambda w: {"tenant": OWNER}),
    f"PUT {CATALOG}/aliases/{{alias}}/pin": Row(TRAIN),
    f"DELETE {CATALOG}/aliases/{{alias}}/pin": Row(TRAIN),
    "POST /catalog/v1/prewarm": Row(USE, lambda w: {"models": [POLICY]}),
    "GET /catalog/v1/tasks": Row(ANY, foreign=None),
    "POST /catalog/v1/tasks": Row(TRAIN, lambda w: {**TASK, "name": "else"}, foreign=None),
    "GET /catalog/v1/tasks/{reference}": Row(ANY, at={"reference": lambda w: "isolation"}),
    "POST /catalog/v1/evaluations": Row(TRAIN, lambda w: EVALUATION),
    "GET /catalog/v1/evaluations": Row(ANY, foreign=None),
    "GET /catalog/v1/evaluations/{evaluation_id}": Row(ANY),
    "GET /catalog/v1/tenants/{tenant}/quota": Row(ANY),
    "PUT /catalog/v1/tenants/{tenant}/quota": Row((), lambda w: {}, foreign=None),
    "DELETE /catalog/v1/tenants/{tenant}/quota": Row((), foreign=None),
    "GET /catalog/v1/usage": Row(ANY, params=lambda w: {"tenant": OWNER}),
    "GET /catalog/v1/audit": Row(TRAIN, params=lambda w: {"tenant": OWNER}),
    "GET /catalog/v1/stats": Row(ANY, foreign=None),
    # -- the operator's
    "GET /catalog/v1/keys": Row((), foreign=None),
    "POST /catalog/v1/keys": Row((), lambda w: {"tenant": OWNER, "role": "read"}, foreign=None),
    "DELETE /catalog/v1/keys/{tenant}/{key_id}": Row((), foreign=None),
    "GET /catalog/v1/tenants": Row((), foreign=None),
}


def path_of(template: str, row: Row, world: World) -> str:
    """The path with the owner's things in it."""
    named: dict[str, Body] = {
        "tenant": lambda w: OWNER,
        "name": lambda w: "kept",
        "reference": lambda w: w.digest,
        "alias": lambda w: "prod",
        "tag": lambda w: "good",
        "session_id": lambda w: w.session,
        "run_id": lambda w: w.run,
        "sampler_id": lambda w: w.sampler,
        "evaluation_id": lambda w: w.evaluation,
        "key_id": lambda w: w.make_key(OWNER, "read").split("_")[1],
        "model": lambda w: POLICY,
        "token": lambda w: "0-0",
        "digest": lambda w: w.digest,
        "file": lambda w: "adapter_config.json",
        **row.at,
    }
    return PARAMETER.sub(lambda match: str(named[match[1]](world)), template)


def ask(world: World, route: str, key: str) -> httpx.Response:
    """The row's request under a key."""
    row, (method, template) = ROWS[route], route.split(" ")
    options: dict[str, Any] = {}
    if row.body:
        options["json"] = row.body(world)
    if row.params:
        options["params"] = row.params(world)
    return world.ask(method, path_of(template, row, world), key, **options)


@pytest.fixture(scope="module")
def world(server: TestServer) -> Iterator[World]:
    world = World(server)
    yield world
    world.ask("POST", f"/api/v1/sessions/{world.session}/finish", world.keys["train"], json={})
    world.http.close()


def routes() -> list[str]:
    found = [route for router in ROUTERS for route in router.routes]
    return sorted(
        f"{method} {route.path.replace(':path', '')}" for route in found for method in route.methods
    )


def test_every_route_has_its_row() -> None:
    assert sorted(ROWS) == routes()


@pytest.mark.parametrize(("route", "row"), ROWS.items())
def test_the_page_says_who_may(route: str, row: Row) -> None:
    method, path = route.split(" ")
    role = re.search(rf"^\| {method} \| `{re.escape(path)}` \| (.*?) \|", PAGE, re.MULTILINE)
    assert role is not None
    assert row.roles == SAID[role[1]]


@pytest.mark.parametrize("route", [name for name, row in ROWS.items() if row.roles is None])
def test_an_open_route_asks_for_no_key(world: World, route: str) -> None:
    assert ask(world, route, "").status_code in (200, 404)


@pytest.mark.parametrize("route", [name for name, row in ROWS.items() if row.roles is not None])
class TestKeys:
    def test_without_a_good_key_nobody_gets_in(self, world: World, route: str) -> None:
        assert ask(world, route, "").status_code == 401
        answers = [ask(world, route, key) for key in (UNKNOWN, world.expired, world.revoked)]
        assert [answer.status_code for answer in answers] == [401] * 3
        told = [{**answer.json(), "request_id": ""} for answer in answers]
        assert told[0] == told[1] == told[2]

    def test_a_role_that_may_not_is_told_so(self, world: World, route: str) -> None:
        for role in {"read", "serve", "train"} - set(ROWS[route].roles or ()):
            answer = ask(world, route, world.keys[role])
            assert answer.status_code == 403, (role, answer.text)

    def test_another_tenant_finds_nothing(self, world: World, route: str) -> None:
        row = ROWS[route]
        for role in row.roles or ():
            key = world.make_key(OTHER, role) if row.spends_key else world.other[role]
            answer = ask(world, route, key)
            if row.foreign is None:
                assert not [thing for thing in world.things() if thing in answer.text]
            else:
                assert answer.status_code == row.foreign, answer.text

    def test_whoever_may_does(self, world: World, route: str) -> None:
        row = ROWS[route]
        for role in ("admin", *(row.roles or ())):
            key = world.make_key(OWNER, role) if row.spends_key else world.keys[role]
            answer = ask(world, route, key)
            assert answer.status_code not in DENIED and answer.status_code < 500, answer.text
