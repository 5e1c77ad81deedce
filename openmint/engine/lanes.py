"""The threads that share one engine step.

On CPUs each lane is one thread with one core and a part of the step's tokens: its tensors fit that
core's cache, and no operation waits for another core. A step too small to be cut runs on the
engine's own thread, where each product uses all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Lanes:
    def __init__(self, device: torch.device, are_many: bool = True) -> None:
        """Not `are_many` where lanes would talk to other ranks, each in an order of its own."""
        self.count = torch.get_num_threads() if device.type == "cpu" and are_many else 1
        self._pool = ThreadPoolExecutor(
            self.count, "lane", initializer=torch.set_num_threads, initargs=(1,)
        )

    def split(self, sizes: Sequence[int], least: int, most: int | None = None) -> list[slice]:
        """Consecutive parts of about equal size, one per lane (or `most`) at most; none is made for
        less than `least`."""
        ends = np.cumsum(sizes)
        count = int(max(1, min(most or self.count, ends[-1] // least)))
        levels = ends[-1] * np.arange(1, count) / count
        cuts = [0, *(int(np.abs(ends - level).argmin()) + 1 for level in levels), len(sizes)]
        return [slice(start, stop) for start, stop in pairwise(cuts) if start < stop]

    def together(self, job: Callable[[], None]) -> None:
        """Run the job on every lane's core at once, this thread being one; back when all ended."""
        others = [self._pool.submit(job) for _ in range(self.count - 1)]
        job()
        for other in others:
            other.result()

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """The results in order. Raises the first failure, once all jobs have ended."""
        if len(jobs) == 1:
            return [jobs[0]()]
        running = [self._pool.submit(job) for job in jobs]
        for future in running:
            future.exception()
        return [future.result() for future in running]
