"""What the demo ends with: claims that must hold, tables, learning curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.demo.catalogue import Score
from examples.demo.progress import Curve

MEAN_STEPS = 5
COLORS = ("#1f6feb", "#d1570b")


class ClaimFailed(Exception):
    """Something that the demo shows isn't so."""


@dataclass
class Report:
    """Collects what was measured. `claim` speaks at once and ends the demo when it is false."""

    console: Console
    num_claims: int = 0
    scores: list[tuple[str, Score, Score, float]] = field(default_factory=list)
    stages: list[tuple[str, float, int]] = field(default_factory=list)

    def claim(self, holds: bool, text: str) -> None:
        """Raises ClaimFailed unless it holds."""
        if not holds:
            raise ClaimFailed(text)
        self.num_claims += 1
        self.console.print(f"  [green]✓[/green] {text}", highlight=False, soft_wrap=True)

    def print_tables(self, base_bytes: int) -> None:
        scores = _table(
            "Held-out score: greedy, exact answer [95 % interval]",
            ("policy", "base", "trained", "rise", "wanted", "n"),
        )
        for policy, before, after, wanted in self.scores:
            rise = f"{after.percent - before.percent:+.1f}"
            scores.add_row(
                policy, str(before), str(after), rise, f"≥ {wanted:.0f}", str(after.num_items)
            )
        stages = _table(
            f"Stages; the base, {base_bytes:,} bytes, never moves",
            ("stage", "seconds", "adapter bytes written", "of the base"),
        )
        for name, seconds, moved in self.stages:
            stages.add_row(name, f"{seconds:.1f}", f"{moved:,}", f"{moved / base_bytes:.1%}")
        self.console.print("", scores, "", stages, "", sep="\n")


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def draw_curves(
    curves: list[Curve], scores: list[tuple[str, Score, Score, float]], path: Path
) -> None:
    """Learning curves as a PNG: each step thin, their running mean thick."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, curve, color, score in zip(axes, curves, COLORS, scores, strict=True):
        steps = range(1, len(curve.values) + 1)
        axis.plot(steps, curve.values, color=color, alpha=0.3, linewidth=1, marker=".")
        axis.plot(steps, running_mean(curve.values), color=color, linewidth=2.2)
        axis.set_title(f"{curve.policy}: {curve.method}", loc="left", fontweight="bold")
        axis.set_xlabel("update")
        axis.set_ylabel(curve.signal)
        axis.set_ylim(bottom=0, top=1.02 if curve.signal == "reward" else None)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        _, before, after, _ = score
        axis.text(
            0.98,
            0.5,
            f"held out (n={after.num_items}): {before.percent:.0f} % → {after.percent:.0f} %",
            transform=axis.transAxes,
            ha="right",
            bbox={"facecolor": "white", "edgecolor": color, "boxstyle": "round,pad=0.4"},
        )
    figure.suptitle("Two tenants, one resident base, trained at the same time", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(values: list[float]) -> list[float]:
    """Mean of each value and up to four before it."""
    return [
        sum(values[max(0, i + 1 - MEAN_STEPS) : i + 1]) / min(i + 1, MEAN_STEPS)
        for i in range(len(values))
    ]
