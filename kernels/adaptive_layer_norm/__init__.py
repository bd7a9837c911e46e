"""Implementations behind fastvar/ops/adaptive_layer_norm.py, where the contract stands."""
