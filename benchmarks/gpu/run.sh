#!/usr/bin/env bash
# Every GPU question in one call, under 10 minutes, without a network: benchmarks/gpu/run.sh
# On a machine without a GPU: benchmarks/gpu/run.sh --tiny
# Arguments go to `python -m benchmarks.gpu`. Results: $OUT, or benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

missing=$("$PYTHON" - <<'CHECK'
import importlib.util
needed = ("torch", "transformers", "numpy", "safetensors")
print(" ".join(name for name in needed if importlib.util.find_spec(name) is None))
CHECK
)
if [ -n "$missing" ]; then
  echo "$PYTHON lacks: $missing. Install them, or name another interpreter: PYTHON=... $0" >&2
  exit 1
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
