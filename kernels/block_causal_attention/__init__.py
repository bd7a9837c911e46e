"""Implementations behind fastvar/ops/block_causal_attention.py, where the contract stands."""
