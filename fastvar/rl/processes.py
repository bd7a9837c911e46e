"""The processes of a run: what they share out, and what they tell each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

_T = TypeVar("_T")


class RewardError(RuntimeError):
    """A reward raised, answered in a wrong shape or only with NaN; names it."""


def make_accelerator() -> Accelerator:
    """The accelerator of a run."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # Which parameters take part depends on the segment and on whether there are references.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
    return Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[unused])


class Processes:
    """Sums and answers over all processes of a run; with one process they are its own. What returns something is to be
    called by all of them at once.

    Attributes:
        index, count: this process, and how many there are.
        main: whether this is the one that writes files.
        sharded: whether FSDP shards the model over them.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.sharded = accelerator.distributed_type == "FSDP"

    def drawn_prompts(self, prompts: int, group_size: int) -> int:
        """How many prompts a rollout draws so that all processes have as many rows, under FSDP as many groups, whose
        passes through the model are to be made together: `prompts` and perhaps some that count for nothing."""
        step = self.count if self.sharded else self.count // math.gcd(self.count, group_size)
        return -(-prompts // step) * step

    def share(self, rows: int) -> range:
        """This process's part of so many rows, which the number of processes divides."""
        size = rows // self.count
        return range(self.index * size, (self.index + 1) * size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum."""
        return self.accelerator.reduce(values, "sum")

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """All values, joined along the first dimension."""
        return self.accelerator.gather(values)

    def objects(self, value: _T) -> list[_T]:
        """The value of each process, as a list."""
        from accelerate.utils import gather_object

        return gather_object([value]) if self.count > 1 else [value]

    def total(self, value: float) -> float:
        """The sum of a number; nothing waits for the device where there is one process."""
        if self.count == 1:
            return float(value)
        return float(self.sum(torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)))

    def mean(self, value: float) -> float:
        """The mean of a number."""
        return self.total(value) / self.count

    def any(self, flag: bool) -> bool:
        """Whether it is true for one of them."""
        return self.total(float(flag)) > 0

    def all(self, flag: bool) -> bool:
        """Whether it is true for each of them."""
        return self.total(float(flag)) == self.count

    def rewarded(self, ask: Callable[[], _T]) -> _T:
        """What `ask`, which calls rewards, returns.

        Raises:
            RewardError: it raised a RuntimeError on this process or on another one.
        """
        answer: Any = None
        error: RuntimeError | None = None
        try:
            answer = ask()
        except RuntimeError as raised:
            error = raised
        if self.any(error is not None):
            raise RewardError(str(error or "a reward misbehaved on another process")) from error
        return answer
