"""Implementations of the operator sample_tokens; see fastvar/ops/sample_tokens.py for the contract."""
