"""Implementations of the operator cached_attention; see fastvar/ops/cached_attention.py for the contract."""
