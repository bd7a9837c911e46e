"""The cross-entropy of a public VAR's or Infinity's trainer without logits: from what the head reads, and its weights.

`loss_of` stands where `trainer.py` calls the model and its `train_loss`. It needs a `head` that is a linear layer and
the last one, as it is in both after `head_nm`. State dict and autocast go on as before: the model's own forward pass
runs, and only its head hands on what it gets. So does DDP with `find_unused_parameters=False`; with True it takes the
head's weights, which are used outside the forward pass, for unused. With FSDP they have to be whole. The trainers' own
lines of accuracy also need logits, which a call of the model gives as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastvar.ops import cross_entropy


@contextmanager
def passed_on(head: nn.Linear) -> Iterator[None]:
    """Inside, the head answers with what it is given."""
    head.forward = lambda hidden: hidden  # on this object alone
    try:
        yield
    finally:
        del head.forward


def loss_of(model: Any, *inputs: Any, tokens: torch.Tensor, weights: torch.Tensor, smoothing: float = 0.0) -> Any:
    """The mean over B of the sum over L of weights (L,) times the loss of tokens (B, L), or the mean loss of bits
    (B, L, d), whose two logits stand side by side. `inputs` are the model's own: labels or texts, and teacher forcing.
    """
    head = getattr(model, "module", model).head
    with passed_on(head):
        hidden = model(*inputs)  # (B, L, C)
    weight, bias, total = head.weight, head.bias, weights.sum()
    if tokens.ndim == 3:  # of two logits only the difference counts
        weight, bias = (each.unflatten(0, (-1, 2)).diff(dim=1).squeeze(1) for each in (weight, bias))
        total = total / tokens.shape[2]
    return cross_entropy(hidden, weight, bias, tokens, label_smoothing=smoothing, weights=weights).loss * total


class Trunk(nn.Module):
    """Stands for a checkout's model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 32), nn.Linear(32, 64)

    def forward(self, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(labels)[:, None] + inputs)


def main() -> None:
    torch.manual_seed(0)
    model = Trunk()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels, inputs, tokens = torch.randint(10, (4,)), torch.randn(4, 21, 32), torch.randint(64, (4, 21))
    for _ in range(3):
        # before: F.cross_entropy(model(labels, inputs).view(-1, V), tokens.view(-1), reduction="none") and its mean
        loss = loss_of(model, labels, inputs, tokens=tokens, weights=torch.full((21,), 1 / 21))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
