"""Implementations behind fastvar/ops/group_norm_silu.py, where the contract stands."""
