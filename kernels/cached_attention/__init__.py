"""Implementations behind fastvar/ops/cached_attention.py, where the contract stands."""
