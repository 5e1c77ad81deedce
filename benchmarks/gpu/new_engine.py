"""A new engine in a new process, as a hand-over by merged weights needs it.

`python -m benchmarks.gpu.new_engine SCALE FOLDER` prints `ready`, then one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.bench import Bench, stored
from benchmarks.gpu.handoff import prompt_logprobs, requests
from benchmarks.gpu.scale import FULL, TINY
from benchmarks.in_process import DIGEST
from openmint.config import WorkerConfig
from openmint.models.loader import load_model


def main(name: str, folder: str) -> None:
    (scale,) = (scale for scale in (FULL, TINY) if scale.name == name)
    settings = {**scale.worker, "kv_cache_bytes": min(2**31, scale.worker["kv_cache_bytes"])}
    config = WorkerConfig(device=scale.device, dtype=scale.dtype, **settings)
    model, base = load_model(name, Path(folder), DIGEST, config)
    with TemporaryDirectory() as store:
        bench = Bench(model, base, config, stored(Path(store)))
        print("ready", flush=True)
        seconds = requests(bench, scale, None, seed=10)
        logprobs = prompt_logprobs(bench, scale, None).tolist()
        print(json.dumps({"requests": seconds, "logprobs": logprobs}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
