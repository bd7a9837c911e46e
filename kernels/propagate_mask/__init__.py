"""Implementations behind fastvar/ops/propagate_mask.py, where the contract stands."""
