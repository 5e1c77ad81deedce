"""The unmodified `tinker` command against a running server."""

import json
import subprocess
import sys

import httpx
import pytest
import tinker


@pytest.fixture(scope="module")
def saved(server):
    """A run with a training state and a sampler checkpoint: their paths."""
    with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
        run = service.create_lora_training_client(base_model=server.base, rank=4).result()
        state = run.save_state("state").result().path
        sampler = run.save_weights_for_sampler("sampler").result().path
        yield run.model_id, state, sampler


@pytest.fixture
def cli(server, tmp_path):
    env = {**server.client_env(server.admin_key), "HOME": str(tmp_path)}

    def call(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "tinker.cli", "--format", "json", *arguments],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return (
            json.loads(done.stdout) if done.stdout.strip().startswith(("{", "[")) else done.stdout
        )

    return call


def test_run_list_and_info(cli, saved):
    run_id, _, _ = saved
    assert run_id in json.dumps(cli("run", "list"))
    assert run_id in json.dumps(cli("run", "info", run_id))


def test_checkpoint_list_info_publish_ttl_and_delete(cli, saved):
    run_id, state, sampler = saved
    listed = json.dumps(cli("checkpoint", "list", "--run-id", run_id))
    assert state in listed
    assert sampler in listed
    assert state in json.dumps(cli("checkpoint", "info", state))
    cli("checkpoint", "publish", state)
    assert '"public": true' in json.dumps(cli("checkpoint", "info", state))
    cli("checkpoint", "unpublish", state)
    cli("checkpoint", "set-ttl", state, "--ttl", "7200")
    cli("checkpoint", "delete", "-y", sampler)
    assert sampler not in json.dumps(cli("checkpoint", "list", "--run-id", run_id))


def test_checkpoint_download_is_a_peft_folder(cli, saved, tmp_path):
    _, state, _ = saved
    cli("checkpoint", "download", state, "--output", str(tmp_path / "out"))
    (config,) = tmp_path.glob("out/**/adapter_config.json")
    assert json.loads(config.read_text())["r"] == 4
    assert (config.parent / "adapter_model.safetensors").stat().st_size > 1000


def test_model_list_and_auth_status(cli, server):
    assert server.base in json.dumps(cli("model", "list"))
    cli("auth", "status")


def test_session_trace(cli, saved, tmp_path):
    run_id, _, _ = saved
    session = run_id.partition(":")[0]
    cli("session", "export-trace", session, "--output", str(tmp_path / "t.json"))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "create_model" in {event["name"] for event in events}


def test_billing(cli, saved):
    cli("billing", "checkpoint-storage")
    cli("billing", "usage", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")


def test_a_key_can_revoke_itself(server):
    key = server.make_key("leaver", "read")
    url = f"{server.url}/api/v1/auth/apikey/me"
    with httpx.Client(headers={"X-API-Key": key}) as http:
        assert http.get(url).json()["name"] in key
        assert http.delete(url).status_code == 204
        assert http.get(url).status_code == 401
