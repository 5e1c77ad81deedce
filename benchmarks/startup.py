"""How long until OpenMinT is of use: ready, first gradient, first sample, memory.

Each repeat starts `openmint serve` anew on a base that is already converted, through the unmodified
Tinker SDK. `python -m benchmarks.startup [--repeats N]` prints a table and writes
benchmarks/results/startup_cpu_<yyyymm>.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import tinker
from tinker import types

from tests.servers import running_server

PROJECT = Path(__file__).resolve().parent.parent
BASES = PROJECT / ".data" / "test-bases"
LIMITS = {"ready": 15.0, "first forward_backward": 5.0, "memory of the service": 3.0}
"""What issue 3 asks for: seconds, seconds, GiB."""


def timed(work: Callable[[], object]) -> float:
    started_at = time.monotonic()
    work()
    return time.monotonic() - started_at


def one_repeat(root: Path) -> dict[str, float]:
    """Seconds of each first thing a user does, and GiB that gateway and worker hold after it."""
    figures: dict[str, float] = {}
    started_at = time.monotonic()
    with running_server(root, bases_from=BASES) as server:
        figures["ready"] = time.monotonic() - started_at
        with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
            run = service.create_lora_training_client(server.base, rank=8).result()
            tokens = list(range(100, 164))
            datum = types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 63},
            )
            data = [datum] * 8

            def backward() -> object:
                return run.forward_backward(data, "cross_entropy").result()

            figures["first forward_backward"] = timed(backward)
            figures["second forward_backward"] = timed(backward)
            figures["optim_step"] = timed(lambda: run.optim_step(types.AdamParams()).result())
            samplers = []
            figures["save_weights_and_get_sampling_client"] = timed(
                lambda: samplers.append(run.save_weights_and_get_sampling_client().result())
            )
            prompt = types.ModelInput.from_ints(tokens[:16])
            one = types.SamplingParams(max_tokens=1)
            sample = samplers[0].sample
            figures["first sample of one token"] = timed(lambda: sample(prompt, 1, one).result())
            figures["second sample of one token"] = timed(lambda: sample(prompt, 1, one).result())
        family = [psutil.Process(server.process.pid)]
        family += family[0].children(recursive=True)
        figures["memory of the service"] = sum(p.memory_info().rss for p in family) / 2**30
    return figures


def report(repeats: list[dict[str, float]]) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tinker"))
    lines = [
        "# Start-up: from `serve` to the first gradient and the first sample",
        "",
        f"`python -m benchmarks.startup --repeats {len(repeats)}`, commit {commit}, "
        f"{datetime.now(UTC):%Y-%m-%d}; Python {platform.python_version()}, {versions}; "
        f"{os.cpu_count()} cores, {platform.machine()}. SmolLM2-135M-Instruct, already converted; "
        "rank 8 on all targets; 8 examples of 63 tokens.",
        "",
        "| what | median | range | asked for |",
        "|---|---|---|---|",
    ]
    for name in repeats[0]:
        values = [figures[name] for figures in repeats]
        unit = "GiB" if name.startswith("memory") else "s"
        limit = f"≤ {LIMITS[name]:g} {unit}" if name in LIMITS else ""
        low, high, middle = min(values), max(values), statistics.median(values)
        lines.append(f"| {name} | {middle:.3f} {unit} | {low:.3f} to {high:.3f} | {limit} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = []
    for i in range(parser.parse_args().repeats):
        with tempfile.TemporaryDirectory() as root:
            repeats.append(one_repeat(Path(root)))
        print(f"repeat {i + 1}: ready after {repeats[-1]['ready']:.1f} s", flush=True)
    text = report(repeats)
    target = PROJECT / "benchmarks" / "results" / f"startup_cpu_{datetime.now(UTC):%Y%m}.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
    print(text)
    return int(any(figures[name] > limit for figures in repeats for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
