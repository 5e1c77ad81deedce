"""Where do arms run? Each library in a long-lived process of its own, idle until its turn.

A process may host several arms, so that one resident model serves them all. The other end of the
pipe is `arms/protocol.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.house import (
    PATIENT,
    Arm,
    ArmFailed,
    Patience,
    Race,
    RaceResult,
    Reading,
    Unavailable,
    run_race,
)
from benchmarks.machine import PROJECT
from benchmarks.rivals import RIVALS, NotInstalled, install
from openmint.cluster.process import MEMORY_ENVIRONMENT

BASES = PROJECT / ".data" / "test-bases"
LOGS = PROJECT / ".data" / "benchmarks" / "logs"
THREADS = 2
LARGEST = 10_000
"""Most revisions of `catalog.py`, unless more is asked for."""
STOP_SECONDS = 20.0
COMMON = {
    "OMP_NUM_THREADS": str(THREADS),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""For every arm."""
TELLING = ("OMP_", "GOMP_", "KMP_", "MALLOC_", "ONEDNN_", "LRU_CACHE_", "LD_PRELOAD")
"""Beginnings of variables that change how fast an arm is; the result shows them."""


@dataclass(frozen=True)
class Host:
    """A kind of process: the module that it runs, and whose environment it needs."""

    module: str
    rival: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


HOSTS = {
    # As `openmint serve` starts its workers: their threads sleep as soon as they wait.
    "ours": Host(
        "benchmarks.arms.ours",
        environment={**MEMORY_ENVIRONMENT, "OMP_WAIT_POLICY": "PASSIVE"},
    ),
    # All others keep the waiting of their libraries, which spin for a moment before they sleep. On
    # idle cores that is worth a lot: without it llama.cpp loses half its speed, PEFT a seventh.
    "ceiling": Host(
        "benchmarks.arms.ceiling",
        # Outputs come from the heap, not from fresh pages: the most that the cores can do.
        environment={
            "MALLOC_MMAP_THRESHOLD_": str(2**25),
            "MALLOC_TRIM_THRESHOLD_": str(2**32),
            "MALLOC_TOP_PAD_": str(2**26),
        },
    ),
    "peft": Host("benchmarks.arms.peft_bf16", rival="peft"),
    "llama": Host("benchmarks.arms.llama", rival="llama"),
    "vllm": Host("benchmarks.arms.vllm_cpu", rival="vllm"),
}


class ArmProcess:
    """A running host and the pipe to it."""

    def __init__(self, name: str, python: Path, host: Host) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        self.versions: dict[str, str] = {}
        # As with `serve`, what the caller's environment says wins.
        environment = {**host.environment, **os.environ, **COMMON}
        self.environment = {k: v for k, v in sorted(environment.items()) if k.startswith(TELLING)}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", host.module],
                cwd=PROJECT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises ArmFailed when the arm did, or when its process has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        where = f"see {self.log.relative_to(PROJECT)}"
        if not line:
            code = self._process.wait()
            raise ArmFailed(f"failed: its process ended with code {code}; {where}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ArmFailed(f"failed: {answer['error']}; {where}")
        self.versions = answer.get("versions", self.versions)
        return answer

    def stop(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(STOP_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class RemoteArm:
    """An arm that some host of the stage runs; implements `house.Arm`."""

    name: str
    stage: Stage
    host: str
    kind: str
    settings: Mapping[str, Any]

    def prepare(self) -> None:
        request = {"do": "prepare", "arm": self.name, "kind": self.kind}
        self.stage.process(self.host).ask({**request, "settings": dict(self.settings)})

    def run(self, lap: int) -> Reading:
        answer = self.stage.process(self.host).ask({"do": "run", "arm": self.name, "lap": lap})
        return Reading(answer.pop("seconds"), answer.pop("tokens"), answer)


class Stage:
    """The processes of one question. Used as a context; leaving it ends them."""

    def __init__(
        self, use_rivals: bool = True, patience: Patience = PATIENT, largest: int = LARGEST
    ) -> None:
        self.patience, self.largest = patience, largest
        self._use_rivals = use_rivals
        self._processes: dict[str, ArmProcess] = {}

    def arm(self, host: str, name: str, kind: str, **settings: Any) -> Arm:
        return RemoteArm(name, self, host, kind, settings)

    def race(self, race: Race, repeats: int) -> RaceResult:
        print(f"  {race.title}", flush=True)
        return run_race(race, repeats, self.patience)

    def process(self, name: str) -> ArmProcess:
        """The running host. Raises Unavailable when its rival isn't to be had."""
        if name not in self._processes:
            host = HOSTS[name]
            python = Path(sys.executable) if host.rival is None else self._python_of(host.rival)
            self._processes[name] = ArmProcess(name, python, host)
        return self._processes[name]

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        return {name: process.versions for name, process in self._processes.items()}

    @property
    def environments(self) -> dict[str, dict[str, str]]:
        return {name: process.environment for name, process in self._processes.items()}

    def _python_of(self, rival: str) -> Path:
        if not self._use_rivals:
            raise Unavailable("left out by --no-rivals")
        try:
            return install(RIVALS[rival])
        except NotInstalled as error:
            raise Unavailable(f"not installed: {error}") from None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.stop()
        self._processes.clear()
