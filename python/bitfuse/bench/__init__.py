"""Benchmarks: the cases, how time is taken, and the results that `bitfuse bench` writes and compares."""
