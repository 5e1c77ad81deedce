"""What loads take, learned from those that were made."""

from __future__ import annotations

FIRST_GUESS_SECONDS = 0.05
"""What a load takes, before one was measured."""
KEPT = 0.98
"""Weight of each measurement after the next one."""


class LoadTimes:
    """A line through the measured loads, seconds over bytes, by least squares; newer ones count
    more. One measurement alone says little: a busy moment makes it ten times as long."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, num_bytes: int, seconds: float) -> None:
        sums = (1.0, num_bytes, seconds, num_bytes * num_bytes, num_bytes * seconds)
        before = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (
            KEPT * old + new for old, new in zip(before, sums, strict=True)
        )

    @property
    def mean_seconds(self) -> float:
        return self._y / self._n if self._n else FIRST_GUESS_SECONDS

    def seconds(self, num_bytes: int) -> float:
        """What a load of so many bytes is likely to take."""
        spread = self._n * self._xx - self._x * self._x
        if spread <= 1e-6 * self._x * self._x:  # all of one size
            return self.mean_seconds
        slope = max(0.0, (self._n * self._xy - self._x * self._y) / spread)
        start = max(0.0, (self._y - slope * self._x) / self._n)
        return start + slope * num_bytes
