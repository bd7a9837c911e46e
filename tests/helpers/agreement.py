"""Whether patched code gives the numbers of the code that it is."""

from __future__ import annotations

import copy
from typing import Any

import torch

Results = dict[str, torch.Tensor]


def moved(model: Any) -> Any:
    """A copy whose parameters are a rounding away."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.empty_like(parameter).uniform_(-1, 1) * torch.finfo(parameter.dtype).eps)
    return model


def agree(found: Results, plain: Results, exact: Results, *others: Results) -> None:
    """Results are as near to those in float64 as the plain code's.

    Args:
        others: the plain code's of moved models, where gradients are sums that cancel: how near they come is chance.
    """
    for each in (plain, *others):
        assert found.keys() == each.keys() and torch.equal(found["tokens"], each["tokens"])
    assert all(found[name].dtype == plain[name].dtype for name in plain)

    def error(results: Results) -> float:
        each = [
            (results[name].double() - value).norm() / value.norm()
            for name, value in exact.items()
            if value.any() and name != "tokens"
        ]
        return torch.stack(each).square().mean().sqrt().item()

    assert error(found) <= 2 * max(map(error, (plain, *others))) + 1e-6
