"""Python imports this at its start when its folder is in PYTHONPATH: the gateway looks ten times a
second for what it may delete, so that saves and kills meet it."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Hurry(MetaPathFinder):
    """Once the gateway's modules are about to load."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "openmint.cli.gateway":
            sys.meta_path.remove(self)
            from openmint.service import gateway

            gateway.SWEEP_SECONDS = 0.1


sys.meta_path.insert(0, Hurry())
