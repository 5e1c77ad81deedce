"""Asks one question in this process: `python -m benchmarks.gpu.question NAME SCALE ROWS`.

Each row is written to the file ROWS as soon as it is measured; a traceback ends it on failure.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.scale import FULL, TINY


def main(name: str, scale_name: str, path: str) -> int:
    (scale,) = (scale for scale in (FULL, TINY) if scale.name == scale_name)
    with Path(path).open("w") as file:
        try:
            for row in importlib.import_module(f"benchmarks.gpu.{name}").rows(scale):
                print(json.dumps(row), file=file, flush=True)
        except Exception:  # the process's edge: the page shows it, other questions go on
            traceback.print_exc()
            print(json.dumps({"traceback": traceback.format_exc()}), file=file, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
