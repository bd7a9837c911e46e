"""Implementations of the operator adaptive_layer_norm; see fastvar/ops/adaptive_layer_norm.py for the contract."""
