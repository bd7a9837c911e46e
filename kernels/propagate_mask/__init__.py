"""Implementations of the operator propagate_mask; see fastvar/ops/propagate_mask.py for the contract."""
