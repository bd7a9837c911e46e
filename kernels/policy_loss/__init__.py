"""Implementations of the operator policy_loss; see fastvar/ops/policy_loss.py for the contract."""
