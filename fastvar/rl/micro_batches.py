"""The rows of a rollout that pass the network together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvar.rl.processes import Processes


class MicroBatch(NamedTuple):
    """Rows of a process's rollout. Where `counts` is False they pass the network and teach nothing: all processes have
    to run as many passes."""

    rows: list[int]
    counts: bool


def micro_batches(mask: torch.Tensor, size: int, processes: Processes) -> list[MicroBatch]:
    """This process's rows in parts, as many as on any other process; none where nothing is to be learned.

    Args:
        mask: (n, L') which tokens are trained. Rows without any are left out.
        size: rows of a part; 0 for all at once.
        processes: of the run.
    """
    rows = [row for row, trained in enumerate((mask > 0).any(1).tolist()) if trained]
    size = size or len(mask)
    parts = [MicroBatch(rows[i : i + size], True) for i in range(0, len(rows), size)]
    most = int(processes.gather(torch.tensor([len(parts)], device=mask.device)).max())
    return [MicroBatch([0], False)] * (most - len(parts)) + parts
