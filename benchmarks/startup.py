"""How long until OpenMinT is of use: ready, first gradient, first sample, memory.

Each repeat starts `openmint serve` anew on a base that is already converted, through the unmodified
Tinker SDK. `python -m benchmarks startup [--repeats N]`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import tinker
from tinker import types

from benchmarks.arms.protocol import versions
from benchmarks.house import Line, Report, Spread, table, verdict
from benchmarks.processes import BASES, Stage
from tests.servers import running_server

LIMITS = {"ready": 15.0, "first forward_backward": 5.0, "memory of the service": 3.0}
"""What issue 3 asks for: seconds, seconds, GiB."""
TITLE = "Start-up: from `serve` to the first gradient and the first sample"
MEASURED = (
    "SmolLM2-135M-Instruct, already converted; rank 8 on all targets; 8 examples of 63 tokens. "
    "Each repeat starts the service anew and talks to it through the Tinker SDK."
)
PACKAGES = ("torch", "transformers", "tinker")


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


def unit_of(name: str) -> str:
    return " GiB" if name.startswith("memory") else " s"


def report(repeats: Sequence[dict[str, float]]) -> Report:
    spreads = {name: Spread.of([figures[name] for figures in repeats]) for name in repeats[0]}
    rows = [[name, spread.show(unit_of(name))] for name, spread in spreads.items()]
    lines = [
        Line(
            f"start-up: {name}",
            f"≤ {limit:g}{unit_of(name)}",
            spreads[name].show(unit_of(name)),
            verdict(spreads[name].median, at_most=limit),
        )
        for name, limit in LIMITS.items()
    ]
    return Report(
        question="startup",
        title=TITLE,
        measured=MEASURED,
        tables=[table([["what", "median (range)"], *rows])],
        lines=lines,
        limits=["Client and service share the cores."],
        data=list(repeats),
        versions={"service": versions(PACKAGES)},
    )


def ask(stage: Stage, repeats: int) -> Report:
    """`stage` is not needed: the service brings its own processes."""
    measured = []
    for i in range(repeats):
        with tempfile.TemporaryDirectory() as root:
            measured.append(one_repeat(Path(root)))
        print(f"repeat {i + 1}: ready after {measured[-1]['ready']:.1f} s", flush=True)
    return report(measured)


if __name__ == "__main__":
    # How `make bench` has called it so far.
    from benchmarks.__main__ import main

    sys.exit(main(["startup", *sys.argv[1:]]))
