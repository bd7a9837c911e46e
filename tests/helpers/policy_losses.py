"""`policy_loss` as tests call it: the tensors of its head and its options by name, to be varied one by one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from fastvar import ops
from fastvar.ops import PolicyLoss, PolicyLossOptions

PLAIN = PolicyLossOptions(panw_alpha=0.0, kl_estimator="k3")
_OPTIONS = tuple(field.name for field in fields(PolicyLossOptions))


def policy_loss(
    *, hidden: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, **given: Any
) -> PolicyLoss:
    """`ops.policy_loss`; options that are not given are those of PLAIN."""
    options = replace(PLAIN, **{name: given.pop(name) for name in _OPTIONS if name in given})
    return ops.policy_loss((hidden, weight, bias), options=options, **given)
