"""Live progress of several trainings at once: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 12
LINE_STEPS = 5
"""Without a terminal, every so many steps make a line."""


@dataclass
class Curve:
    """The course of one training: `values` by step, of what `signal` says."""

    policy: str
    method: str
    signal: str
    num_steps: int
    values: list[float] = field(default_factory=list)
    num_trained_tokens: int = 0
    num_sampled_tokens: int = 0
    seconds: float = 0.0

    @property
    def trained_tokens_per_second(self) -> float:
        return self.num_trained_tokens / self.seconds if self.seconds else 0.0

    @property
    def sampled_tokens_per_second(self) -> float:
        return self.num_sampled_tokens / self.seconds if self.seconds else 0.0


class Board:
    """Shows curves while threads add to them. Safe to use from any thread."""

    def __init__(self, console: Console, curves: list[Curve]) -> None:
        self._console, self._curves = console, curves
        self._lock = threading.Lock()
        self._started_at = time.monotonic()
        self._live = Live(self._table(), console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Board:
        self._started_at = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
        else:
            self._console.print(self._table())

    def add(self, curve: Curve, value: float, num_trained: int, num_sampled: int = 0) -> None:
        """One step of `curve` is done."""
        with self._lock:
            curve.values.append(value)
            curve.num_trained_tokens += num_trained
            curve.num_sampled_tokens += num_sampled
            curve.seconds = time.monotonic() - self._started_at
            if self._console.is_terminal:
                self._live.update(self._table())
            elif len(curve.values) % LINE_STEPS == 0 or len(curve.values) == curve.num_steps:
                self._console.print(_line(curve), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("policy", "method", "step", "", "now", "train tok/s", "sample tok/s", "s"):
            left = title in ("policy", "method", "")
            table.add_column(title, justify="left" if left else "right", no_wrap=bool(title))
        for curve in self._curves:
            table.add_row(
                curve.policy,
                curve.method,
                f"{len(curve.values)}/{curve.num_steps}",
                sparkline(curve.values),
                f"{curve.signal} {curve.values[-1]:.2f}" if curve.values else curve.signal,
                f"{curve.trained_tokens_per_second:.0f}",
                f"{curve.sampled_tokens_per_second:.0f}",
                f"{curve.seconds:.0f}",
            )
        return table


def sparkline(values: list[float]) -> str:
    """The last values as bars between the smallest and the largest of all."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values[-SPARK_WIDTH:])


def _line(curve: Curve) -> str:
    return (
        f"  {curve.policy:<17} {curve.method:<5} step {len(curve.values):>2}/{curve.num_steps}"
        f"  {curve.signal} {curve.values[-1]:.3f}"
        f"  trained {curve.trained_tokens_per_second:.0f} tok/s"
        f"  sampled {curve.sampled_tokens_per_second:.0f} tok/s  {curve.seconds:.0f} s"
    )
