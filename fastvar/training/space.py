"""Whether a run's folder has room for what the run writes."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn


def check_space(output: Path, model: nn.Module) -> None:
    """Before the first step: room for one checkpoint, which is the weights, their average and AdamW's two moments.

    Args:
        output: the run's folder, which need not be there yet.
        model: what is trained.

    Raises:
        OSError: there is less.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    needed = 2 * weights + moments
    folder = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"train: output: expected {needed / 2**20:.0f} MiB of free space in {folder} for a checkpoint, "
            f"got {free / 2**20:.0f}"
        )
