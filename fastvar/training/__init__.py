"""Supervised training of tokenizers, VAR and Infinity models: one loop, a task for each."""

import fastvar.threads  # noqa: F401  # before torch comes
from fastvar.training.infinity_task import InfinityTask
from fastvar.training.loop import TrainConfig, TrainResult, train
from fastvar.training.tokenizer_task import TokenizerTask
from fastvar.training.tokens import TokenDataset
from fastvar.training.var_task import VARTask

__all__ = ["InfinityTask", "TokenDataset", "TokenizerTask", "TrainConfig", "TrainResult", "VARTask", "train"]
