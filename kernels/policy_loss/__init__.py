"""Implementations behind fastvar/ops/policy_loss.py, where the contract stands."""
