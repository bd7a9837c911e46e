"""Whether patched code gives the numbers of the code that it is."""

from __future__ import annotations

import torch


def agree(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Results are as near to those in float64 as the plain code's."""
    assert found.keys() == plain.keys() and torch.equal(found["tokens"], plain["tokens"])
    assert all(found[name].dtype == plain[name].dtype for name in plain)

    def error(results: dict[str, torch.Tensor]) -> float:
        each = [
            (results[name].double() - value).norm() / value.norm()
            for name, value in exact.items()
            if value.any() and name != "tokens"
        ]
        return torch.stack(each).square().mean().sqrt().item()

    assert error(found) <= 2 * error(plain) + 1e-6
