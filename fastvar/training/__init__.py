"""Supervised training of tokenizers and VAR models: one loop, two tasks."""

import fastvar.threads  # noqa: F401  # before torch comes
from fastvar.training.loop import TrainConfig, TrainResult, train
from fastvar.training.tokenizer_task import TokenizerTask
from fastvar.training.tokens import TokenDataset
from fastvar.training.var_task import VARTask

__all__ = ["TokenDataset", "TokenizerTask", "TrainConfig", "TrainResult", "VARTask", "train"]
