"""Whether patched code gives the numbers of the code that it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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


def agree(found: Results, plain: Results, exact: Results, *others: tuple[Results, Results]) -> None:
    """Results are as near to those in float64 as the plain code's.

    Args:
        others: both of moved models, where gradients are sums that cancel: how near one model's come is chance.
    """
    pairs = [(found, plain), *others]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys() and torch.equal(ours["tokens"], theirs["tokens"])
        assert all(ours[name].dtype == theirs[name].dtype for name in theirs)

    def error(of_models: Sequence[Results]) -> float:
        each = [
            (results[name].double() - value).norm() / value.norm()
            for results in of_models
            for name, value in exact.items()
            if value.any() and name != "tokens"
        ]
        return torch.stack(each).square().mean().sqrt().item()

    assert error([ours for ours, _ in pairs]) <= 2 * error([theirs for _, theirs in pairs]) + 1e-6
