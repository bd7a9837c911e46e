"""A training step under PyTorch's profiler, with fastvar's ranges; the same ranges reach NVTX, for Nsight Systems:

FASTVAR_NVTX=1 nsys profile --trace=nvtx,cuda python examples/profile_step.py
"""

import torch
from torch.profiler import ProfilerActivity, profile

from fastvar.models import VAR, VARConfig


def main(depth: int = 4, batch: int = 2) -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = VARConfig(grids=((1, 1), (2, 2), (4, 4), (8, 8)), depth=depth, embed_dim=64 * depth, num_heads=depth)
    var = VAR(config).to(device).train()
    tokens = var.schedule.num_tokens
    inputs = torch.randn(batch, tokens - 1, config.code_channels, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        var(labels, inputs).float().logsumexp(-1).mean().backward()
    averages = found.key_averages()
    print(averages.table(sort_by=f"self_{device}_time_total", row_limit=12))
    return [each.key for each in averages]


if __name__ == "__main__":
    main()
