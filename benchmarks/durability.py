"""What does it cost that no acknowledged step is lost, and how long does it take to have it back?

Through the unmodified Tinker SDK against real services: `python -m benchmarks durability`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tinker
from tinker import types

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, Unavailable, table, verdict
from benchmarks.processes import BASES, Stage
from tests.servers import (
    TestServer,
    running_server,
    start_server,
    stop_server,
    wait_until_ready,
    workers_of,
)

MEMORY_DISK = Path("/dev/shm")
ROWS, TOKENS, STEPS = 8, 256, 4
MOST_COST = 0.05
NUM_POLICIES, NUM_UPDATES = 100, 2
MOST_RECOVERY_SECONDS = 10.0
TRAINING_BYTES = 5 << 30
LOG_SECONDS = 300.0
MEASURED = (
    f"SmolLM2-135M-Instruct, rank 8 on all targets. Cost: tokens per second of one client with "
    f"{STEPS} steps under way, each a `forward_backward` of {ROWS} rows of {TOKENS} tokens and an "
    "`optim_step`. Durable: the default, on disk. Volatile: `durability = replay` with all data in "
    f"memory ({MEMORY_DISK}), so that nothing is logged and nothing waits for a disk. Both "
    f"services run, and take turns. Recovery: {NUM_POLICIES} policies with {NUM_UPDATES} logged "
    "updates each, as many as the log's limit allows; the worker is killed. From the moment when "
    "the next one has the base resident until every policy is as it was."
)
PACKAGES = ("torch", "transformers", "tinker")


def data(seed: int, rows: int, tokens: int) -> list[types.Datum]:
    drawn = np.random.default_rng(seed).integers(100, 40_000, (rows, tokens + 1))
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:].tolist(), "weights": [1.0] * tokens},
        )
        for row in drawn
    ]


def tokens_per_second(run: tinker.TrainingClient, seed: int) -> float:
    started_at = time.monotonic()
    pending = []
    for step in range(STEPS):
        pending.append(run.forward_backward(data(seed + step, ROWS, TOKENS), "cross_entropy"))
        pending.append(run.optim_step(types.AdamParams(learning_rate=1e-5)))
    for future in pending:
        future.result()
    return STEPS * ROWS * TOKENS / (time.monotonic() - started_at)


@contextmanager
def one_run(root: Path, environ: dict[str, str]) -> Iterator[tinker.TrainingClient]:
    with (
        running_server(root, bases_from=BASES, environ=environ) as server,
        tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service,
    ):
        yield service.create_lora_training_client(server.base, rank=8, seed=1).result()


def costs(repeats: int) -> list[dict[str, float]]:
    """Tokens per second with and without durability, repeat by repeat."""
    if not MEMORY_DISK.is_dir():
        raise Unavailable(f"{MEMORY_DISK} is not there")
    with (
        tempfile.TemporaryDirectory() as disk,
        tempfile.TemporaryDirectory(dir=MEMORY_DISK) as memory,
        one_run(Path(disk) / "s", {}) as durable,
        one_run(Path(memory) / "s", {"OPENMINT_WORKER_DURABILITY": "replay"}) as volatile,
    ):
        found = []
        for repeat in range(-1, repeats):
            rates = {}
            for name, run in (("durable", durable), ("volatile", volatile)):
                rates[name] = tokens_per_second(run, 10 * repeat + 10)
            print(f"repeat {repeat + 1}: {rates}", flush=True)
            found.append(rates)
    return found[1:]


def recovery(repeats: int) -> list[dict[str, float]]:
    """Seconds until all policies are back, after one kill each."""
    environ = {
        "OPENMINT_WORKER_TRAINING_BYTES": str(TRAINING_BYTES),
        "OPENMINT_SERVICE_SNAPSHOT_IDLE_SECONDS": "3600",
        "OPENMINT_LOG_FORMAT": "json",
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        (root / "data" / "bases").symlink_to((BASES / "bases").resolve())
        server = start_server(root, root / "data", environ=environ)
        try:
            wait_until_ready(server)
            with tinker.ServiceClient(base_url=server.url, api_key=server.admin_key) as service:
                runs = [
                    service.create_lora_training_client(server.base, rank=8, seed=seed).result()
                    for seed in range(NUM_POLICIES)
                ]
                for update in range(NUM_UPDATES):
                    update_all(runs, update)
                return [one_recovery(server, runs) for _ in range(repeats)]
        finally:
            stop_server(server)


def update_all(runs: Sequence[tinker.TrainingClient], seed: int) -> None:
    pending = []
    for run in runs:
        run.forward_backward(data(seed, 1, 16), "cross_entropy")
        pending.append(run.optim_step(types.AdamParams(learning_rate=1e-4)))
    for future in pending:
        future.result()


def one_recovery(server: TestServer, runs: Sequence[tinker.TrainingClient]) -> dict[str, float]:
    before = len(rebuilt(server))
    started_at = time.monotonic()
    for worker in workers_of(server):
        worker.kill()
    while len(rebuilt(server)) == before:
        assert time.monotonic() - started_at < LOG_SECONDS, "the policies did not come back"
        time.sleep(0.1)
    event = rebuilt(server)[-1]
    assert event["runs"] == NUM_POLICIES, event
    for run in runs[:: NUM_POLICIES // 5]:
        run.forward(data(0, 1, 16), "cross_entropy").result()
    found = {
        "all policies rebuilt, from the base's residence": float(event["seconds"]),
        "the same, from the kill": time.monotonic() - started_at,
    }
    print(found, flush=True)
    return found


def rebuilt(server: TestServer) -> list[dict[str, float]]:
    """What the service said of rebuilt runs, each time."""
    lines = server.log.read_text().splitlines()
    return [json.loads(line) for line in lines if '"runs_rebuilt"' in line]


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: the services are processes of their own."""
    return report(costs(repeats), recovery(repeats))


def report(rates: Sequence[dict[str, float]], times: Sequence[dict[str, float]]) -> Report:
    cost = Spread.of([100 * (1 - each["durable"] / each["volatile"]) for each in rates])
    back = {name: Spread.of([each[name] for each in times]) for name in times[0]}
    whole = back["all policies rebuilt, from the base's residence"]
    lines = [
        Line(
            "durability: training throughput that it costs",
            f"≤ {100 * MOST_COST:g} %",
            cost.show(" %"),
            verdict(cost.median, at_most=100 * MOST_COST),
        ),
        Line(
            f"recovery of {NUM_POLICIES} policies, the base resident",
            f"≤ {MOST_RECOVERY_SECONDS:g} s",
            whole.show(" s"),
            verdict(whole.median, at_most=MOST_RECOVERY_SECONDS),
        ),
    ]
    speeds = {name: Spread.of([each[name] for each in rates]) for name in rates[0]}
    rows = [[name, spread.show(" tokens/s")] for name, spread in speeds.items()]
    rows += [[name, spread.show(" s")] for name, spread in back.items()]
    return Report(
        question="durability",
        title="What durability costs, and how long recovery takes",
        measured=MEASURED,
        tables=[table([["what", "median (range)"], *rows])],
        lines=lines,
        limits=["Client and services share the cores."],
        data={"rates": list(rates), "recovery": list(times)},
        versions={"service": versions(PACKAGES)},
    )
