"""The command that measures tiles on the user's card."""

from __future__ import annotations

from dataclasses import dataclass

from fastvar.ranges import Positive


@dataclass(frozen=True)
class Tune:
    """Measure which tile sizes of the kernels are fastest on this GPU. They are written to a file in the cache folder
    and taken from then on; `fastvar info` names it, and without it everything is as the package has it."""

    ops: tuple[str, ...] = ()
    """Operators to tune; all by default."""
    minutes: Positive = 10.0
    """To spend at most; the most important kernels come first."""

    def run(self) -> None:
        import torch

        from fastvar import tuning
        from fastvar.kernels.common.tiling import card, own_path
        from fastvar.workloads import workloads

        known = workloads()
        names = list(dict.fromkeys(workload.op for workload in known))
        unknown = sorted(set(self.ops) - set(names))
        if unknown:
            raise ValueError(f"tune: ops: expected some of {', '.join(names)}, got {', '.join(unknown)}")
        if not torch.cuda.is_available():
            raise RuntimeError("tune: needs a CUDA device, torch sees none")
        device = torch.device("cuda", torch.cuda.current_device())
        here = card(device)
        calls = [
            (workload.name, lambda workload=workload: workload.build(device, torch.bfloat16, "triton"))
            for workload in known
            if not self.ops or workload.op in self.ops
        ]
        tuner = tuning.Tuner(here, tuning.DeviceClock(device), 60 * self.minutes)
        written = tuner.run(calls)
        print(f"{written} rows: {own_path(here.name)}" if written else "nothing was measured")
