"""Implementations of the operator block_causal_attention; see fastvar/ops/block_causal_attention.py for the contract."""
