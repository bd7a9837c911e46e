"""Implementations behind fastvar/ops/token_log_probs.py, where the contract stands."""
