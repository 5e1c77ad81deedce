"""Fused operations for CPUs and GPUs, each beside a slow reference; imports nothing above."""
