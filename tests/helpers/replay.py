"""What given tokens stand for in float64, for tests of quantisers whose roundings differ."""

from __future__ import annotations

import torch
from fastvar.kernels.residual_quantize import reference

from fastvar.ops import ResidualConv
from fastvar.ops.residual_quantize import AccumulateCall
from fastvar.schedule import ScaleSchedule


def replayed(
    tokens: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor, schedule: ScaleSchedule,
    phi: ResidualConv | None, znorm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """In float64, for the residuals that these tokens leave: by how much a code is nearer than the token's, what a
    rounding in float32 of such a distance is, the feature map and the inputs."""
    features, codebook = features.double(), codebook.double()
    feature_map, excess, rounding, inputs = torch.zeros_like(features), [], [], []
    for k, part in enumerate(tokens.split(schedule.lengths, 1)):
        rows = reference._to_rows(reference._area(features - feature_map, schedule[k]))  # [B, n, C]
        if znorm:
            rows, codes = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (rows, codebook))
            distances, size = -rows @ codes.T, torch.ones(rows.shape[:2], dtype=torch.float64)
        else:
            distances = torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
            size = rows.square().sum(-1) + codebook.square().sum(-1).amax()
        excess.append(distances.gather(2, part[..., None])[..., 0] - distances.amin(2))
        rounding.append(size * torch.finfo(torch.float32).eps)
        convolution = None
        if phi is not None:
            convolution = phi._replace(weight=phi.weight.double(), bias=phi.bias.double()).of(k)
        following = schedule[k + 1] if k + 1 < len(schedule) else (0, 0)
        call = AccumulateCall(feature_map, part, codebook, convolution, *schedule[k], *following)
        feature_map, next_input = reference.accumulate_scale(call)
        inputs.append(next_input)
    return torch.cat(excess, 1), torch.cat(rounding, 1), feature_map, torch.cat(inputs, 1)
