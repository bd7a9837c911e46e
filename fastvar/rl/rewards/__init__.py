"""Rewards: one protocol, a registry by name, and their weighted sum.

Importing them is cheap: packages that a reward needs are imported, and weights loaded, when it is created.
"""

from fastvar.rl.rewards.aesthetic import AestheticReward
from fastvar.rl.rewards.base import (
    Description,
    Reward,
    RewardFunction,
    RewardSum,
    available,
    check_options,
    create,
    register,
)
from fastvar.rl.rewards.clip import CLIPImageReward, CLIPTextReward
from fastvar.rl.rewards.dino import DINOReward
from fastvar.rl.rewards.hps import HPSv2Reward
from fastvar.rl.rewards.in_process import InProcess
from fastvar.rl.rewards.ocr import OCRReward
from fastvar.rl.rewards.pixels import ColourReward, JPEGSizeReward
from fastvar.rl.rewards.readers import EasyOCRReader, RapidOCRReader
from fastvar.rl.rewards.remote import RemoteReward, reward_server

__all__ = [
    "AestheticReward",
    "CLIPImageReward",
    "CLIPTextReward",
    "ColourReward",
    "DINOReward",
    "Description",
    "EasyOCRReader",
    "HPSv2Reward",
    "InProcess",
    "JPEGSizeReward",
    "OCRReward",
    "RapidOCRReader",
    "RemoteReward",
    "Reward",
    "RewardFunction",
    "RewardSum",
    "available",
    "check_options",
    "create",
    "register",
    "reward_server",
]
