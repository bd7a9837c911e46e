"""Reinforcement learning: what a policy is rewarded for, and what it learns from it."""

from fastvar.rl.returns import middle_returns

__all__ = ["middle_returns"]
