"""From rows to a page for people and a JSON file for programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "numba")


@dataclass
class Answer:
    """One question's rows, and how its process ended."""

    question: str
    title: str
    measured: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""
    consequence: str = ""
    """What it means for the questions after it."""

    @property
    def is_whole(self) -> bool:
        return not self.failure

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by the table that they belong to, in the order in which they came."""
        tables: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            rest = {name: value for name, value in row.items() if name != "table"}
            tables.setdefault(row["table"], []).append(rest)
        return tables


def circumstances(device: str) -> dict[str, str]:
    """Where this runs: device, versions, commit if it is known."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        "device": device_text(device),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def device_text(device: str) -> str:
    import torch

    if torch.device(device).type != "cuda":
        return f"CPU: {platform.machine()}, {os.cpu_count()} cores; a check that it runs, no result"
    facts = torch.cuda.get_device_properties(0)
    return (
        f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} "
        f"multiprocessors, CUDA {torch.version.cuda}"
    )


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """From `OPENMINT_COMMIT`, else from git; a copied tree may know neither."""
    if given := os.environ.get("OPENMINT_COMMIT"):
        return given
    try:
        command = ["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def page(at: Mapping[str, str], answers: Sequence[Answer]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in at.items())
    parts = [f"# On a GPU: {at['scale']}", facts]
    for answer in answers:
        parts += [f"## {answer.title}", answer.measured]
        for name, rows in answer.tables().items():
            parts += [f"**{name}**", table(rows)]
        if answer.failure:
            parts += [
                f"Failed after {answer.seconds:.0f} s:",
                f"```\n{answer.failure.strip()}\n```",
            ]
        else:
            parts.append(f"{answer.seconds:.0f} s.")
        if answer.consequence:
            parts.append(f"**{answer.consequence}**")
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[show(row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write(folder: Path, stem: str, at: Mapping[str, str], answers: Sequence[Answer]) -> Path:
    """Write the page and the JSON file; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.md"
    path.write_text(page(at, answers))
    content = {**at, "answers": [asdict(answer) for answer in answers]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    return path
