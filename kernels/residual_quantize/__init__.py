"""Implementations of the operator residual_quantize; see fastvar/ops/residual_quantize.py for the contract."""
