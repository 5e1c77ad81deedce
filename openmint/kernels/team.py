"""Threads that go through one kernel together, phase by phase.

Each thread runs the same kernel. A phase is a number of pieces of work; threads claim one after
another, so a thread that is held up leaves the rest to the others, and all wait for the last piece.
Between phases nobody sleeps: a phase takes microseconds, and so does waking a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from openmint.kernels.compiler import intrinsic, ir, types
from openmint.kernels.jit import address, inlined
from openmint.types import IntArray

FIELDS, CLAIMED, DONE = 16, 0, 8
"""A phase's counters stand in cache lines of their own."""
SPINS = 2000
"""Looks at a counter before a thread offers its core to others: about 50 microseconds."""


Together = Callable[[Callable[[], None]], None]
"""Runs a job on every thread of a team; returns when all have ended."""


def alone(job: Callable[[], None]) -> None:
    """A team of the calling thread."""
    job()


def team(num_phases: int) -> IntArray:
    """Counters for one run of a kernel."""
    return np.zeros(num_phases * FIELDS, np.int64)


@intrinsic
def _add_one(typing: Any, address: Any) -> Any:
    """The counter before one was added."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.intp), generate


@intrinsic
def _read(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the core that this is a loop that waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        module, name = builder.module, "llvm.x86.sse2.pause"
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(module.globals.get(name) or ir.Function(module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _give_way(typing: Any) -> Any:
    """Let another thread have this core, if one wants it (POSIX `sched_yield`)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        module, name = builder.module, "sched_yield"
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(module.globals.get(name) or ir.Function(module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@inlined
def share(team: Any, phase: Any, total: Any, work: Any, arguments: Any) -> None:
    """Do `work(i, *arguments)` for every `i < total` together; all is done on return."""
    counters = address(team) + phase * FIELDS * 8
    i = _add_one(counters + CLAIMED * 8)
    while i < total:
        work(i, *arguments)
        _add_one(counters + DONE * 8)
        i = _add_one(counters + CLAIMED * 8)
    spins = 0
    while _read(counters + DONE * 8) < total:
        spins += 1
        if spins < SPINS:
            _pause()
        else:
            _give_way()
