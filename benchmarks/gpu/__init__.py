"""What does OpenMinT do on a GPU? `benchmarks/gpu/run.sh` asks every question in one call.

Each question is a module with a generator `rows(scale)`; each of its rows stands by itself, so what
was measured before a failure, or before its time was up, stays. Torch, transformers, numpy and
safetensors are all that it needs; Triton where the device has it.
"""
