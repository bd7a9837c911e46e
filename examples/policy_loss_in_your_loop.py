"""The policy loss in a GRPO loop of your own: from hidden states and the head's weights to gradients.

The logits of all tokens are never in memory. `hidden` is what your model hands to its head; anything that draws tokens
scale by scale and scores them can stand around it.
"""

import torch
from torch import nn

from fastvar import ScaleSchedule
from fastvar.ops import PolicyLossOptions, group_advantages, policy_loss


def step(
    trunk: nn.Module,
    head: nn.Linear,
    inputs: torch.Tensor,
    tokens: torch.Tensor,
    rewards: torch.Tensor,
    schedule: ScaleSchedule,
    group_size: int,
    old_log_probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of n rows: inputs (n, L, C) of teacher forcing, the tokens (n, L) that were drawn, rewards (n,) of groups of
    adjacent rows; the old log-probabilities (n, L) are None for the first update on a rollout."""
    advantages = group_advantages(rewards, group_size)
    hidden = trunk(inputs)  # (n, L, C)
    options = PolicyLossOptions(panw_alpha=0.6, clip_low=0.2, clip_high=0.28)
    out = policy_loss(
        (hidden, head.weight, head.bias), tokens, advantages, schedule, options, old_log_probs=old_log_probs
    )
    return out.loss


def main() -> None:
    torch.manual_seed(0)
    schedule, width, vocabulary = ScaleSchedule((1, 2, 4)), 32, 64
    trunk, head = nn.Linear(width, width), nn.Linear(width, vocabulary)
    optimizer = torch.optim.AdamW([*trunk.parameters(), *head.parameters()], lr=1e-3)
    inputs = torch.randn(8, schedule.num_tokens, width)
    tokens = torch.randint(vocabulary, (8, schedule.num_tokens))
    for _ in range(3):
        loss = step(trunk, head, inputs, tokens, rewards=torch.rand(8), schedule=schedule, group_size=4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():+.4f}")


if __name__ == "__main__":
    main()
