"""The flat recipes, each a few steps against the real server, through the public SDK alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import TestServer

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def run_recipe(server: TestServer, name: str, steps: int) -> str:
    done = subprocess.run(
        [sys.executable, str(RECIPES / name), "--steps", str(steps)],
        env=server.client_env(server.make_key("recipes")),
        cwd=server.client_dir,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_recipes_import_nothing_of_ours(path: Path):
    tree = ast.parse(path.read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in ("openmint", "examples")}


@pytest.mark.integration
def test_sl_loop_lowers_its_loss(server: TestServer):
    said = run_recipe(server, "sl_loop.py", steps=8)
    losses = [float(x) for x in re.findall(r"loss per answer ([\d.]+)", said)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 2
    assert re.search(r"held out: \d+/50 right", said)
    assert "sampler_weights/final" in said


@pytest.mark.integration
def test_rl_loop_samples_and_updates(server: TestServer):
    said = run_recipe(server, "rl_loop.py", steps=3)
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", said)]
    assert len(rewards) == 3
    assert 0 < max(rewards) <= 1
    assert "sampler_weights/final" in said
