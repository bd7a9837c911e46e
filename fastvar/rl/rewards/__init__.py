"""Rewards: one protocol, a registry by name, and their weighted sum."""

from fastvar.rl.rewards.base import Reward, RewardFunction, RewardSum, available, create, register
from fastvar.rl.rewards.ocr import OCRReward
from fastvar.rl.rewards.pixels import JPEGSizeReward

__all__ = [
    "JPEGSizeReward",
    "OCRReward",
    "Reward",
    "RewardFunction",
    "RewardSum",
    "available",
    "create",
    "register",
]
