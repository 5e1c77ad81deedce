"""A policy's life through the command line: import, promote, ask, roll back, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.servers import TestServer, run_cli, run_cli_json

pytestmark = pytest.mark.integration

POLICY = "clerk/support"


@pytest.fixture(scope="module")
def env(server: TestServer) -> dict[str, str]:
    return {"OPENMINT_URL": server.url, "OPENMINT_API_KEY": server.make_key("clerk", "admin")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, embedded_base: Path) -> list[Path]:
    """Two PEFT folders with different weights."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(embedded_base, root / f"adapter-{seed}", seed) for seed in (1, 2)]


def make_adapter(base: Path, directory: Path, seed: int) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def digests(env: dict[str, str], adapters: list[Path]) -> list[str]:
    added: list[Any] = [
        run_cli_json("import", str(folder), "--policy", POLICY, environ=env) for folder in adapters
    ]
    return [revision["digest"] for revision in added]


def test_imported_revisions_are_listed_newest_first(
    env: dict[str, str], digests: list[str]
) -> None:
    listed: Any = run_cli_json("revisions", "ls", POLICY, environ=env)
    assert [item["digest"] for item in listed] == digests[::-1]
    policies: Any = run_cli_json("policies", "ls", environ=env)
    assert [item["policy"] for item in policies] == [POLICY]
    shown: Any = run_cli_json("revisions", "show", f"{POLICY}@{digests[0][:20]}", environ=env)
    assert (shown["rank"], shown["digest"]) == (4, digests[0])


def test_promote_and_rollback_move_the_alias_and_keep_its_history(
    env: dict[str, str], digests: list[str]
) -> None:
    first, second = (f"{POLICY}@{digest}" for digest in digests)
    assert "--yes" in run_cli("promote", first, "--alias", "a", environ=env, code=2).stderr
    one: Any = run_cli_json("promote", first, "--alias", "a", "--yes", environ=env)
    two: Any = run_cli_json(
        "promote", second, "--alias", "a", "--yes", "--reason", "better", environ=env
    )
    assert (one["digest"], two["digest"]) == tuple(digests)
    stale = ("promote", first, "--alias", "a", "--yes", "--if-version", str(one["version"]))
    run_cli(*stale, environ=env, code=4)
    back: Any = run_cli_json("rollback", POLICY, "--alias", "a", "--yes", environ=env)
    assert back["digest"] == digests[0]
    history: Any = run_cli_json("aliases", "history", POLICY, "--alias", "a", environ=env)
    assert [event["action"] for event in history] == ["rollback", "promote", "promote"]
    assert history[1]["reason"] == "better"
    aliases: Any = run_cli_json("aliases", "ls", POLICY, environ=env)
    assert {"a": digests[0]}.items() <= {a["name"]: a["digest"] for a in aliases}.items()


def test_chat_answers_once_and_streams_a_conversation(
    server: TestServer, env: dict[str, str]
) -> None:
    question = "What is the capital of France?"
    options = ("--temperature", "0", "--max-tokens", "16")
    assert "Paris" in run_cli("chat", server.base, question, *options, environ=env).stdout


def test_evaluate_scores_a_task_file(
    server: TestServer, env: dict[str, str], tmp_path: Path
) -> None:
    item = {"prompt": "The capital of France is", "answer": "Paris"}
    task = {"name": "capital", "scorer": "contains", "max_tokens": 4, "items": [item]}
    path = tmp_path / "task.json"
    path.write_text(json.dumps(task))
    result: Any = run_cli_json("evaluate", server.base, "--task", str(path), environ=env)
    assert (result["status"], result["n"], result["score"]) == ("finished", 1, 1.0)


def test_an_exported_folder_is_what_peft_loads(
    env: dict[str, str],
    digests: list[str],
    adapters: list[Path],
    embedded_base: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "peft"
    run_cli("export", f"{POLICY}@{digests[0]}", str(out), environ=env)
    model = AutoModelForCausalLM.from_pretrained(embedded_base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, out)
    again = AutoModelForCausalLM.from_pretrained(embedded_base, dtype=torch.float32)
    original = peft.PeftModel.from_pretrained(again, adapters[0])
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        # The store keeps adapters in the serving precision, bf16.
        torch.testing.assert_close(
            theirs(tokens).logits, original(tokens).logits, atol=0.2, rtol=0.02
        )
    assert "exists" in run_cli("export", POLICY, str(out), environ=env, code=2).stderr


def test_a_merged_export_is_an_ordinary_model(
    server: TestServer, env: dict[str, str], digests: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    arguments = (f"{POLICY}@{digests[0]}", str(out), "--merged", "--data", str(server.data))
    run_cli("export", *arguments, environ=env)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert merged.config.architectures == ["LlamaForCausalLM"]


def test_what_is_not_there_exits_3_and_a_bad_key_1(server: TestServer, env: dict[str, str]) -> None:
    run_cli("policies", "show", "clerk/nothing", environ=env, code=3)
    run_cli("revisions", "show", f"{POLICY}@no-such-alias", environ=env, code=3)
    bad = {**env, "OPENMINT_API_KEY": "tml-om_x_y"}
    run_cli("policies", "ls", environ=bad, code=1)
    assert "tenant/policy" in run_cli("policies", "show", "../x", environ=env, code=2).stderr


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    nowhere = {"OPENMINT_URL": "http://127.0.0.1:9", "OPENMINT_API_KEY": "tml-om_x_y"}
    assert "openmint serve" in run_cli("policies", "ls", environ=nowhere, code=1).stderr


def test_a_pickle_is_refused_before_it_is_sent(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    failed = run_cli("import", str(tmp_path), "--policy", POLICY, environ=env, code=1)
    assert "pickle" in failed.stderr
