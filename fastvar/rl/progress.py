"""What a run has to remember besides its weights."""

from __future__ import annotations

import math
from typing import Any


class Progress:
    """The numbers that a checkpoint keeps.

    Attributes:
        skipped: updates in a row that were skipped, as their gradient was not finite.
        skipped_in_all: all of those.
        best: the return of the best evaluation.
        kl: the KL of the last update.
    """

    def __init__(self) -> None:
        self.skipped, self.skipped_in_all = 0, 0
        self.best, self.kl = -math.inf, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The attributes as JSON has them, which knows no infinity: what is left out is as at the start."""
        return {name: value for name, value in vars(self).items() if math.isfinite(value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the attributes from a checkpoint."""
        vars(self).update(state)
