"""Fused operations for CPUs, each beside a slow reference; imports nothing above."""
