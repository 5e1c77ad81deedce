"""Recipes of tinker-cookbook, unchanged, as processes of their own environment: they learn.

Every claim is read from the recipe's own metrics.jsonl. `make .venv-cookbook/.ready` makes the
environment. The recipes' settings here are short; docs/cookbook.md tells what they reach.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import tinker

from tests.conftest import PROJECT

PYTHON = PROJECT / ".venv-cookbook" / "bin" / "python"
SCRIPTS = PROJECT / "examples" / "cookbook"
LIMIT_SECONDS = 280

pytestmark = [
    pytest.mark.cookbook,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="run `make .venv-cookbook/.ready` first"),
]


@dataclass(frozen=True)
class Run:
    """What a recipe left in its log folder."""

    folder: Path
    output: str

    def metric(self, name: str) -> list[float]:
        """The values of a metric in order of steps; steps without it are left out."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        values = [row[name] for row in rows if name in row]
        assert values, f"no {name} in {self.folder}"
        return values

    def checkpoint(self, name: str) -> dict[str, object]:
        lines = (self.folder / "checkpoints.jsonl").read_text().splitlines()
        return next(row for row in map(json.loads, lines) if row["name"] == name)


@pytest.fixture(scope="module")
def recipe(server):
    """`recipe("sl_jsonl", log_path, batch_size=4)`: a finished run of that example script."""

    def run(script: str, folder: Path, **settings: object) -> Run:
        arguments = [f"{name}={value}" for name, value in settings.items()]
        done = subprocess.run(
            [PYTHON, SCRIPTS / f"{script}.py", f"log_path={folder}", *arguments],
            cwd=server.client_dir,
            env={**server.client_env(server.admin_key), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return Run(folder, done.stdout)

    return run


@pytest.fixture(scope="module")
def supervised(recipe, tmp_path_factory) -> Run:
    return recipe("sl_jsonl", tmp_path_factory.mktemp("sl") / "log", num_epochs=2, save_every=4)


@pytest.fixture
def rest(server):
    return tinker.RestClient(base_url=server.url, api_key=server.admin_key)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_supervised_learning_lowers_the_loss_on_held_out_lines(supervised):
    losses = supervised.metric("train_mean_nll")
    assert mean(losses[-3:]) < 0.4 * losses[0]
    held_out = supervised.metric("test/nll")
    assert held_out[-1] < 0.4 * held_out[0]


def test_periodic_checkpoints_expire_and_the_final_one_stays(supervised, rest):
    final = supervised.checkpoint("final")
    run = rest.get_training_run_by_tinker_path(final["state_path"]).result()
    assert run.user_metadata["renderer_name"] == "role_colon"
    listed = rest.list_checkpoints(run.training_run_id).result().checkpoints
    expires = {checkpoint.tinker_path: checkpoint.expires_at for checkpoint in listed}
    assert expires[supervised.checkpoint("000004")["state_path"]] is not None
    assert expires[final["state_path"]] is None
    assert expires[final["sampler_path"]] is None


def test_a_finished_run_resumes_from_its_checkpoint(recipe, supervised):
    """One more epoch in the same folder starts from the optimizer's state, not from the base."""
    num_before = len(supervised.metric("train_mean_nll"))
    first = supervised.metric("train_mean_nll")[0]
    resumed = recipe("sl_jsonl", supervised.folder, num_epochs=3, eval_every=0)
    assert "Resumed" in resumed.output
    later = resumed.metric("train_mean_nll")[num_before:]
    assert len(later) == 5
    assert max(later) < 0.4 * first


def test_preference_optimisation_widens_the_margin(recipe, tmp_path):
    run = recipe("dpo_jsonl", tmp_path / "log", num_epochs=1)
    assert run.metric("dpo_loss")[0] == pytest.approx(0.693, abs=0.01)
    assert run.metric("dpo_loss")[-1] < 0.5
    assert run.metric("margin")[-1] > 0.5
    assert run.metric("accuracy")[-1] >= 0.75


def test_distillation_brings_the_student_closer_to_its_teacher(recipe, supervised, tmp_path):
    teacher = supervised.checkpoint("final")["sampler_path"]
    run = recipe("distillation", tmp_path / "log", teacher_checkpoint=teacher)
    kl = run.metric("teacher_kl")
    # Three runs without a seed fell to 0.42, 0.44 and 0.57 of where they began.
    assert mean(kl[-2:]) < 0.8 * mean(kl[:2])


def test_reinforcement_on_sums_raises_the_reward(recipe, tmp_path):
    run = recipe("arithmetic", tmp_path / "log")
    rewards = run.metric("env/all/reward/total")
    # Each step has problems of its own, and at all of them the base earns -0.1 to -0.05 (a run with
    # a rate of 0). Five runs without a seed rose by 0.11 to 0.4: all learn to end, some to add.
    # Only the first step is the base's: a quick run has learned half of it by the second.
    assert mean(rewards[-3:]) > rewards[0] + 0.05
    # The trainer's view of the sampled tokens is the sampler's.
    assert max(map(abs, run.metric("optim/kl_sample_train_v1"))) < 0.01


def test_players_learn_the_form_of_a_guess(recipe, tmp_path, rest):
    """A few conversations teach some of the form; reinforcement, the rest of it."""
    warm = recipe(
        "sl_jsonl",
        tmp_path / "warm",
        file_path=SCRIPTS / "data" / "guesses.jsonl",
        test_size=0,
        num_epochs=1,
        learning_rate=5e-4,
        eval_every=0,
        save_every=0,
        rolling_save_every=2,
    )
    start = str(warm.checkpoint("final")["state_path"])
    # The rolling checkpoint was deleted when the run was over.
    run_id = rest.get_training_run_by_tinker_path(start).result().training_run_id
    listed = rest.list_checkpoints(run_id).result().checkpoints
    assert {checkpoint.checkpoint_id for checkpoint in listed} == {
        "weights/final",
        "sampler_weights/final",
    }
    run = recipe("guess_number", tmp_path / "log", load_checkpoint_path=start)
    rewards = run.metric("env/all/reward/total")
    # From -1.9 (of -2 to 1) to 0.0 without a seed: one epoch leaves the form to be learned.
    assert mean(rewards[-2:]) > rewards[0] + 0.3
