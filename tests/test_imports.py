"""Imports run one way between rooms, and the gateway never loads torch.

Read from the syntax trees, so that an import inside a function counts too where it matters.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "openmint"
GROUND = {"types", "errors", "config"}
"""Modules that every room may import."""

VALUES = {"scheduler.work", "engine.plan", "catalog.records", "cluster.worker_setup", "losses.spec"}
"""Plain frozen values that cross from room to room; they count as ground for their importers."""

MAY_IMPORT: dict[str, set[str]] = {
    "api": {"service", "wire", "observe"},
    "service": {"cluster", "catalog", "journal", "store", "wire", "evaluate", "observe"},
    "wire": set(),
    "evaluate": set(),
    "catalog": {"evaluate"},
    "store": set(),
    "observe": set(),
    "cluster": {"engine", "journal", "models", "observe", "residency", "scheduler", "store"},
    "journal": {"store"},
    "scheduler": {"residency"},
    "residency": set(),
    "engine": {"kernels", "layers", "losses", "models", "store"},
    "plan": {"engine", "models"},
    "models": {"kernels", "layers"},
    "layers": {"kernels"},
    "kernels": set(),
    "losses": set(),
}
"""Which rooms a room may import besides itself. `cli` joins all and is imported by none."""

GATEWAY_CLUSTER = {"cluster.worker_client", "cluster.link"}
"""The part of `cluster` that runs in the gateway."""

FOREIGN_TO: dict[str, set[str]] = {
    "api": {"torch", "transformers", "sqlalchemy", "safetensors"},
    "service": {"torch", "transformers", "sqlalchemy", "fastapi", "starlette"},
    "wire": {"torch", "transformers", "sqlalchemy", "fastapi"},
    "catalog": {"torch", "transformers", "fastapi"},
    "store": {"torch", "transformers", "sqlalchemy", "fastapi"},
    "journal": {"torch", "transformers", "sqlalchemy", "fastapi"},
    "evaluate": {"torch", "transformers", "sqlalchemy", "fastapi"},
    "observe": {"torch", "transformers", "sqlalchemy", "fastapi"},
    "scheduler": {"torch", "transformers", "sqlalchemy", "fastapi"},
    "residency": {"torch", "transformers", "sqlalchemy", "fastapi"},
    "engine": {"sqlalchemy", "fastapi", "starlette"},
    "plan": {"sqlalchemy", "fastapi", "starlette"},
    "models": {"sqlalchemy", "fastapi", "starlette"},
    "layers": {"sqlalchemy", "fastapi"},
    "kernels": {"sqlalchemy", "fastapi", "transformers"},
    "losses": {"sqlalchemy", "fastapi", "transformers"},
}
"""Libraries that a room must not name anywhere, not even inside a function."""


def modules() -> list[str]:
    paths = [path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts]
    return sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths)


def room_of(module: str) -> str:
    return module.split(".")[0]


def source_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


@cache
def imports_of(module: str, *, at_load: bool) -> frozenset[str]:
    """Full names that a module imports; with `at_load` only those that run when it is imported."""
    tree = ast.parse(source_of(module).read_text())
    nodes = _load_time(tree) if at_load else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write it in full"
            assert node.module
            found.update(_named(node.module, alias.name) for alias in node.names)
    return frozenset(found)


def _named(module: str, name: str) -> str:
    """`from openmint.store import blobs` names the module openmint.store.blobs."""
    if module.split(".")[0] == "openmint":
        inner = [*module.split(".")[1:], name]
        if PACKAGE.joinpath(*inner).with_suffix(".py").exists():
            return f"{module}.{name}"
    return module


def _load_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run at import: not function bodies, not `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _load_time(node)


def ours(names: frozenset[str]) -> set[str]:
    """Our modules among the names, without the package prefix."""
    prefix = "openmint."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def rooms_of(names: frozenset[str]) -> set[str]:
    """The rooms among the names, ground floor and values left out."""
    return {room_of(name) for name in ours(names) - VALUES} - GROUND


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_rooms_below_its_own(module: str) -> None:
    room = room_of(module)
    allowed = {room} | MAY_IMPORT.get(room, set())
    if module in VALUES | GROUND:
        allowed = set()
    elif room in {"__main__", "cli"}:
        allowed = {"cli", *MAY_IMPORT}
    imported = rooms_of(imports_of(module, at_load=False))
    assert imported <= allowed, f"{module} imports {sorted(imported - allowed)}"


@pytest.mark.parametrize("module", [name for name in modules() if room_of(name) in FOREIGN_TO])
def test_a_module_names_no_library_that_is_foreign_to_its_room(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports_of(module, at_load=False)}
    foreign = libraries & FOREIGN_TO[room_of(module)]
    assert not foreign, f"{module} imports {sorted(foreign)}"


@pytest.mark.parametrize("module", [name for name in modules() if room_of(name) == "service"])
def test_the_gateway_sees_only_its_own_end_of_the_worker_link(module: str) -> None:
    cluster = ours(imports_of(module, at_load=False)) - VALUES
    beyond = {name for name in cluster if room_of(name) == "cluster"} - GATEWAY_CLUSTER
    assert not beyond, f"{module} imports {sorted(beyond)}"


def test_rooms_form_no_loop() -> None:
    edges: dict[str, set[str]] = {}
    for module in modules():
        room = room_of(module)
        edges.setdefault(room, set()).update(rooms_of(imports_of(module, at_load=True)) - {room})
    finished: set[str] = set()

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join((*path, room))
        if room not in finished:
            for below in sorted(edges.get(room, ())):
                visit(below, (*path, room))
            finished.add(room)

    for room in sorted(edges):
        visit(room, ())


@pytest.mark.parametrize(
    "module", ["openmint.api.app", "openmint.cli.main", "openmint.cli.gateway"]
)
def test_the_gateway_process_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
