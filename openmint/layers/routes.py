"""What becomes of the choices that a batch's tokens make on their way: which experts, which keys.

The sampler's are kept, the trainer's are replaced by them. Shapes: T tokens, K experts of a token,
C chosen keys of a query.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Routes(Protocol):
    """Asked once in each layer that chooses, by its place among those that do."""

    def experts(self, layer: int, own_TK: Tensor) -> Tensor:
        """The experts to take, `[T, K]`, where the router would take `own_TK`."""
        ...

    def keys(self, layer: int, own_TC: Tensor | None) -> Tensor | None:
        """The positions to see, where the indexer would have `own_TC`; None: all up to the token's
        own."""
        ...
