"""`openmint plan` as it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.servers import run_cli, run_cli_json
from tests.workbench import random_model


def test_a_plan_is_told_to_people_and_to_programs(tmp_path: Path) -> None:
    folder = random_model("deepseek-v3", tmp_path / "base")
    config = str(folder / "config.json")
    asked = ("plan", "--base", config, "--gpus", "2", "--gpu-memory", "0.1", "--rank", "2")
    found: Any = run_cli_json(*asked)
    assert found["architecture"] == "DeepseekV3ForCausalLM"
    assert found["placement"] == {
        "workers": 2,
        "ranks": 1,
        "tensor": 1,
        "expert": 1,
        "data": 1,
    }
    assert [each["targets"] for each in found["adapters"]] == [
        ["attn"],
        ["attn", "mlp"],
        ["attn", "mlp", "unembed"],
    ]
    assert found["memory"]["weights_total"] == sum(found["memory"]["weights"].values())
    text = run_cli(*asked).stdout
    assert "2 of 1 GPU\n" in text
    assert "routed experts" in text
    assert f"{found['kv']['tokens']:,} tokens" in text


def test_what_does_not_fit_is_wrong_usage(tmp_path: Path) -> None:
    folder = str(random_model("llama", tmp_path / "base"))
    done = run_cli("plan", "--base", folder, "--gpus", "1", "--gpu-memory", "0.001", code=2)
    assert "doesn't fit 1 GPU of 0.001 GB" in done.stderr
    assert "Give" in done.stderr
