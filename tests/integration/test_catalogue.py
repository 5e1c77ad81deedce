"""The catalogue of many adapters over HTTP and the command line: all imported at once, found
again, and kept for a while."""

from __future__ import annotations

import json
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.servers import TestServer, run_cli, run_cli_json, running_server
from tests.tiny import write_adapter

pytestmark = pytest.mark.integration

TENANT = "many"


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[[str], Path]
) -> Iterator[TestServer]:
    root = tmp_path_factory.mktemp("catalogue")
    with running_server(root, bases=(str(tiny_base("llama")),)) as server:
        yield server


@pytest.fixture(scope="module")
def env(tiny: TestServer) -> dict[str, str]:
    return {"OPENMINT_URL": tiny.url, "OPENMINT_API_KEY": tiny.make_key(TENANT, "train")}


@pytest.fixture(scope="module")
def http(env: dict[str, str]) -> Iterator[httpx.Client]:
    headers = {"X-API-Key": env["OPENMINT_API_KEY"]}
    with httpx.Client(base_url=env["OPENMINT_URL"], headers=headers, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five adapters of three policies, and one that fits no base."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("north/1", "north/2", "north/3", "east", "west")):
        write_adapter(root / name, seed)
    unfit = write_adapter(root / "unfit", 9)
    (unfit / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    return root


@pytest.fixture(scope="module")
def imported(env: dict[str, str], folder: Path) -> dict[str, Any]:
    """By path in the folder, what became of each adapter."""
    done = run_cli("import-all", str(folder), "--base", "tiny-llama", "--json", environ=env, code=1)
    return {item["path"]: item for item in json.loads(done.stdout)}


def test_what_fits_is_a_revision_and_what_does_not_is_named(
    env: dict[str, str], imported: dict[str, Any]
) -> None:
    assert sorted(imported) == ["east", "north/1", "north/2", "north/3", "unfit", "west"]
    assert "shape" in imported["unfit"]["error"] and imported["unfit"]["digest"] is None
    assert [imported[f"north/{n}"]["number"] for n in (1, 2, 3)] == [1, 2, 3]
    listed: Any = run_cli_json("revisions", "ls", f"{TENANT}/north", environ=env)
    assert [item["digest"] for item in listed] == [
        imported[f"north/{n}"]["digest"] for n in (3, 2, 1)
    ]
    policies: Any = run_cli_json("policies", "ls", environ=env)
    assert [item["name"] for item in policies] == ["east", "north", "west"]


def test_what_was_imported_at_once_answers(http: httpx.Client, imported: dict[str, Any]) -> None:
    body = {"model": f"{TENANT}/north", "prompt": "Hi", "max_tokens": 2}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["openmint"]["revision"] == imported["north/3"]["digest"]


def test_a_tar_again_gives_the_same_revisions(
    env: dict[str, str], folder: Path, imported: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "adapters.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, ".", filter=lambda each: None if "unfit" in each.name else each)
    again: Any = run_cli_json("import-all", str(path), "--base", "tiny-llama", environ=env)
    assert {item["path"]: item for item in again} == {
        path: item for path, item in imported.items() if path != "unfit"
    }


def test_an_import_needs_the_role_the_tenant_and_a_tar(
    tiny: TestServer, http: httpx.Client, env: dict[str, str], tmp_path: Path
) -> None:
    tar = {"content-type": "application/x-tar"}
    assert http.post("/catalog/v1/imports", content=b"", headers=tar).status_code == 400
    assert http.post("/catalog/v1/imports", json={}).status_code == 415
    stranger = {**tar, "X-API-Key": tiny.make_key("stranger", "train")}
    params = {"tenant": TENANT}
    answer = http.post("/catalog/v1/imports", content=b"", headers=stranger, params=params)
    assert answer.status_code == 404
    reader = {**tar, "X-API-Key": tiny.make_key(TENANT, "read")}
    assert http.post("/catalog/v1/imports", content=b"", headers=reader).status_code == 403
    empty: subprocess.CompletedProcess[str] = run_cli(
        "import-all", str(tmp_path), environ=env, code=2
    )
    assert "adapter_config.json" in empty.stderr


def test_tags_find_what_has_them_until_they_are_taken_away(
    http: httpx.Client, env: dict[str, str], imported: dict[str, Any]
) -> None:
    second = imported["north/2"]["digest"]
    run_cli("tag", f"{TENANT}/east", "cheap", environ=env)
    run_cli("tag", f"{TENANT}/north@{second[:20]}", "best", environ=env)
    assert http.get(f"/catalog/v1/policies/{TENANT}/east").json()["tags"] == ["cheap"]
    shown = http.get(f"/catalog/v1/policies/{TENANT}/north/revisions/{second}").json()
    assert shown["tags"] == ["best"]
    found: Any = run_cli_json("policies", "ls", "--tag", "cheap", environ=env)
    assert [item["name"] for item in found] == ["east"]
    found = run_cli_json("revisions", "find", "--tag", "best", environ=env)
    assert [item["digest"] for item in found] == [second]
    run_cli("untag", f"{TENANT}/north@{second}", "best", environ=env)
    run_cli("untag", f"{TENANT}/east", "cheap", environ=env)
    assert http.get("/catalog/v1/revisions", params={"tag": "best"}).json()["items"] == []
    actions = [event["action"] for event in http.get("/catalog/v1/audit").json()["items"]]
    assert actions[:4] == ["policy.untag", "revision.untag", "revision.tag", "policy.tag"]
    bad = http.put(f"/catalog/v1/policies/{TENANT}/east/tags/Not a tag")
    assert bad.status_code == 400


def test_revisions_are_found_by_owner_base_and_name(
    http: httpx.Client, env: dict[str, str], imported: dict[str, Any]
) -> None:
    owner = http.get(f"/catalog/v1/policies/{TENANT}/north").json()["owner"]
    assert owner in env["OPENMINT_API_KEY"]

    def found(**wanted: Any) -> list[str]:
        items, cursor = [], None
        while True:
            params = {**wanted, "limit": 2, **({"cursor": cursor} if cursor else {})}
            page = http.get("/catalog/v1/revisions", params=params).json()
            items += [f"{item['policy']}/{item['number']}" for item in page["items"]]
            if (cursor := page["next_cursor"]) is None:
                return items

    everything = [f"{TENANT}/{path}" for path in ("east/1", "north/1", "north/2", "north/3")]
    everything.append(f"{TENANT}/west/1")
    assert found(base="tiny-llama") == found() == everything
    assert sorted(found(owner=owner)) == everything
    assert found(prefix="nor") == everything[1:4]
    assert found(base="other") == found(owner="nobody") == found(task="none") == []
    answer = http.get("/catalog/v1/revisions", params={"min_score": 0.5})
    assert answer.status_code == 400 and "task" in answer.json()["detail"]


def test_lineage_goes_both_ways(tiny: TestServer, http: httpx.Client, env: dict[str, str]) -> None:
    client = tinker.ServiceClient(base_url=tiny.url, api_key=env["OPENMINT_API_KEY"])
    run = client.create_lora_training_client(
        "tiny-llama", rank=1, seed=1, user_metadata={"policy": "trained"}
    ).result()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([5, 6, 7]),
        loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0] * 3},
    )
    for name in ("one", "two", "three"):
        run.forward_backward([datum], "cross_entropy").result()
        run.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        run.save_weights_for_sampler(name).result()
    page = http.get(f"/catalog/v1/policies/{TENANT}/trained/revisions").json()
    three, two, one = (item["digest"] for item in page["items"])
    up: Any = run_cli_json("revisions", "lineage", f"{TENANT}/trained@{three}", environ=env)
    assert [(item["distance"], item["digest"]) for item in up] == [(0, three), (1, two), (2, one)]
    down: Any = run_cli_json(
        "revisions", "lineage", f"{TENANT}/trained@{one}", "--descendants", "--depth", "1",
        environ=env,
    )  # fmt: skip
    assert [(item["distance"], item["digest"]) for item in down] == [(1, two)]


def test_a_policy_keeps_as_many_revisions_as_it_is_told(
    tiny: TestServer, http: httpx.Client, env: dict[str, str], tmp_path: Path
) -> None:
    for seed in range(4):
        write_adapter(tmp_path / "kept" / str(seed), 100 + seed)
    run_cli("import-all", str(tmp_path), "--base", "tiny-llama", environ=env)
    path, policy = f"/catalog/v1/policies/{TENANT}/kept", f"{TENANT}/kept"
    listed = http.get(f"{path}/revisions").json()["items"]
    first = listed[-1]["digest"]
    http.post(f"{path}/aliases/prod/promote", json={"revision": first})
    before: Any = run_cli_json("policies", "retention", policy, environ=env)
    assert (before["own"], before["keep_revisions"], before["surplus"]) == (None, None, [])
    plan: Any = run_cli_json("policies", "retention", policy, "--keep", "2", environ=env)
    assert (plan["own"], [item["number"] for item in plan["surplus"]]) == (2, [2])
    deadline = time.monotonic() + 30
    while len(http.get(f"{path}/revisions").json()["items"]) == 4:
        assert time.monotonic() < deadline, "no sweep came"
        time.sleep(0.5)
    left = [item["number"] for item in http.get(f"{path}/revisions").json()["items"]]
    assert left == [4, 3, 1]
    admin = {**env, "OPENMINT_API_KEY": tiny.admin_key}
    garbage: Any = run_cli_json("gc", environ=admin)
    assert listed[-2]["digest"] in [item["digest"] for item in garbage]
    assert all(item["goes_at"] for item in garbage if item["digest"] == listed[-2]["digest"])
    assert run_cli_json("policies", "retention", policy, environ=env) == {**plan, "surplus": []}
