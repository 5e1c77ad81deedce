"""Confidence of a score measured on n items."""

from __future__ import annotations

from math import sqrt

Z_95 = 1.959963984540054


def wilson_interval(num_right: int, num_items: int) -> tuple[float, float]:
    """The 95% Wilson score interval of `num_right / num_items`; (0, 1) when nothing was measured.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if num_items == 0:
        return 0.0, 1.0
    share = num_right / num_items
    z2_n = Z_95 * Z_95 / num_items
    centre = (share + z2_n / 2) / (1 + z2_n)
    half = Z_95 * sqrt(share * (1 - share) / num_items + z2_n / (4 * num_items)) / (1 + z2_n)
    low = 0.0 if num_right == 0 else centre - half
    high = 1.0 if num_right == num_items else centre + half
    return low, high
