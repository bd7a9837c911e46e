"""Interrupts that lose nothing: Ctrl-C and what clusters send let a run finish its step and save."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was told to stop, and has saved; says where."""

    def __init__(self, signal_name: str, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal_name} after step {step}, saved in {checkpoint}; the same command goes on from there"
        )
        self.exit_status = 128 + signal.Signals[signal_name]


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is only noted in `received`, by name; the next one does what it
    did before: it ends the program at once.

    Only the main thread can take signals: in another one nothing changes. A signal that is ignored, as under nohup,
    stays so.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        try:
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    signal.signal(number, self._note)
                    self._before[number] = before
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.received = signal.Signals(number).name
        # Processes that are forked in between inherit this: they go on in silence, as the step does.
        if os.getpid() == self._process:
            # not print, which may be what was interrupted
            os.write(2, f"\nfastvar: {self.received}: saving after this step; once more to end at once\n".encode())


def outlive_the_first_signal(worker: int) -> None:
    """For a worker of a loader, where torch's own handler would end it: clusters tell a run's whole group to stop, and
    the step that is to be finished needs its batch. A second SIGTERM ends the worker."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


class SharedRequests:
    """Whether to stop and whether to save, as any process requests it; all know it at the same step: at once where
    there is one process, else a step later, so that no step waits for the device."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._before: tuple[torch.Tensor, Any] | None = None

    def __call__(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """What to do after this step, from what this process asks for."""
        if self.accelerator.num_processes == 1:
            return stop, save
        device = self.accelerator.device
        sums = self.accelerator.reduce(torch.tensor([float(stop), float(save)]).to(device, non_blocking=True), "sum")
        sums = sums.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        before, self._before = self._before, (sums, event)
        if before is None:
            return False, False
        if before[1] is not None:
            before[1].synchronize()
        stop_all, save_all = before[0].tolist()
        return stop_all > 0, save_all > 0
