"""Implementations of the operator token_log_probs; see fastvar/ops/token_log_probs.py for the contract."""
