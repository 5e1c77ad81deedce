"""The question "concurrent" on a base with experts: are N policies done sooner at once there too?

`python -m benchmarks concurrent_experts [--repeats N]`. Rollouts, replay of the routes that the
sampler took, updates and exports of adapters on every expert, by the jobs of `grpo.py`.
"""

from __future__ import annotations

from benchmarks.concurrent import Study, answer
from benchmarks.grpo import Setting, Workload, variety
from benchmarks.house import Report
from benchmarks.mixtures import EXPERTS, base_folder
from benchmarks.processes import Stage

COUNTS = (1, 2, 4)
JOB = Workload(num_steps=2, max_tokens=24, num_evaluated=2)
INJECTED_SECONDS = 4.0
SETTINGS = (
    Setting("zero wait", variety),
    Setting(f"injected wait of {INJECTED_SECONDS:g} s a step", variety, False, INJECTED_SECONDS),
)
TITLE = "Concurrent policies on a base with experts: N GRPO jobs at once against one after another"
MEASURED = (
    "A random Qwen3-MoE of 12 layers of 32 experts, 4 of them a token's (0.67 B parameters), bf16; "
    "one `openmint serve` per arm, the unmodified Tinker SDK, one client process, a thread per "
    f"policy. A policy's job, rank {JOB.rank} on attention and all experts: {JOB.num_steps} steps, "
    f"each `save_weights_and_get_sampling_client`, {JOB.num_prompts} prompts x {JOB.group_size} "
    f"samples of exactly {JOB.max_tokens} tokens (no stop), rewards at once from the text, "
    "importance-sampling `forward_backward` along the routes that the sampler took, and "
    f"`optim_step`; then export and greedy evaluation ({JOB.num_evaluated} prompts x "
    f"{JOB.evaluated_tokens} tokens). Policy i has the same prompts and seeds in all arms. "
    f"Injected wait: {INJECTED_SECONDS:g} s of sleep in each step, a stand-in for slow tools. "
    "Memory: all processes, client included, sampled four times a second."
)


def ask(stage: Stage, repeats: int) -> Report:
    base = base_folder("mixture-0.7b", "Qwen3MoeConfig", EXPERTS)
    study = Study("concurrent_experts", TITLE, MEASURED, base, JOB, SETTINGS, COUNTS)
    return answer(study, stage, repeats)
