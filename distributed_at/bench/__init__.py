"""Measurements that a user makes of a run of their own; the project's benchmarks are in ``benchmarks/``."""
