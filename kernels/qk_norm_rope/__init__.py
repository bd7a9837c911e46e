"""Implementations behind fastvar/ops/qk_norm_rope.py, where the contract stands."""
