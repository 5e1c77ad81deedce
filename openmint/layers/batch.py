"""Everything about a batch but its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from openmint.kernels.team import Together, alone
from openmint.layers.adapters import AdapterBatch
from openmint.layers.attention import Attention
from openmint.layers.routes import Routes


@dataclass(frozen=True, slots=True)
class Batch:
    """Who sees whom, which adapter serves whom, and what becomes of the tokens' choices."""

    attention: Attention
    adapters: AdapterBatch | None
    routes: Routes | None = None
    """None: they are made anew and not kept."""
    together: Together = alone
    """The threads that share what kernels can."""
