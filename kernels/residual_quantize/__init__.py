"""Implementations behind fastvar/ops/residual_quantize.py, where the contract stands."""
