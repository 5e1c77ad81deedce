"""An arm that does nothing, in a process of its own."""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks.arms.protocol import Turn, serve


def toy(tokens: int) -> Turn:
    def turn(lap: int) -> dict[str, Any]:
        print("a library that writes to standard output")
        if tokens == 0:
            raise ValueError("no tokens")
        if tokens < 0:
            sys.stdout.flush()
            os._exit(3)
        return {"seconds": 1.0, "tokens": tokens, "said": lap, "pid": os.getpid()}

    return turn


if __name__ == "__main__":
    serve({"toy": toy}, packages=("numpy",))
