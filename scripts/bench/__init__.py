"""Benchmarks: the workload, and the comparison with TRL on it."""
