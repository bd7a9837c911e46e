"""Implementations behind fastvar/ops/sample_tokens.py, where the contract stands."""
