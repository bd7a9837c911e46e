"""Implementations of the operator qk_norm_rope; see fastvar/ops/qk_norm_rope.py for the contract."""
