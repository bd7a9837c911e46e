"""The loop of flow_grpo (scripts/train_sd3.py of July 2025) with a next-scale model and fastvar's policy loss.

A scale is here what a timestep is there. One forward pass gives all of them, so that the loop `for j in ...` over the
timesteps goes: its lines from `compute_log_prob` to `loss = policy_loss` become one call of `loss_of`. With it goes the
factor `num_train_timesteps` of the Accelerator's `gradient_accumulation_steps`: else the optimizer steps too seldom.
The model stays in `.eval()` where the script calls `.train()`: else it drops conditions. `config.train` keeps its names
and gets one more, `panw_alpha`, the weighting of scales (0 for none). What is sampled has `labels`, `inputs`, `tokens`
and `log_probs` of all tokens instead of latents. One process; several need the model's forward pass for DDP, which
`fastvar.rl.VMRGRPOTrainer` sees to.
"""

from types import SimpleNamespace
from typing import Any

import torch

from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.ops import PolicyLoss, PolicyLossOptions, policy_loss
from fastvar.rl import add_adapters, without_adapters


def loss_of(transformer: VAR, sample: dict[str, torch.Tensor], train: Any) -> PolicyLoss:
    """The loss of a batch of flow_grpo's `samples`, by tokens. Two of its numbers are others than there: `kl` is exact
    over the vocabulary, where kl_loss compares means of latents; `clip_fraction` leaves out ratios beyond `clip_range`
    that still give a gradient, where clipfrac counts all."""
    # the same for each step of a sample
    advantages = sample["advantages"][:, 0].clamp(-train.adv_clip_max, train.adv_clip_max)
    head = transformer.scored(transformer.hidden(sample["labels"], sample["inputs"]))
    reference = None
    if train.beta > 0:
        with torch.no_grad(), without_adapters(transformer):  # flow_grpo: transformer.module.disable_adapter()
            reference = transformer.scored(transformer.hidden(sample["labels"], sample["inputs"]))
    options = PolicyLossOptions(
        panw_alpha=train.panw_alpha, clip_low=train.clip_range, clip_high=train.clip_range, kl_weight=train.beta
    )
    return policy_loss(
        head,
        sample["tokens"],
        advantages,
        transformer.schedule,
        options,
        old_log_probs=sample["log_probs"],
        reference_head=reference,
    )


def draw(transformer: VAR, labels: torch.Tensor, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """In the place of `pipeline_with_logprob`: what the loss needs of samples (B, ...), and their images."""
    drawn = transformer.generate(labels, seed=seed, log_probs=True)
    inputs = transformer.tokenizer.teacher_forcing(drawn.tokens)
    return {"labels": labels, "inputs": inputs, "tokens": drawn.tokens, "log_probs": drawn.log_probs}, drawn.images


def main(epochs: int = 2) -> VAR:
    torch.manual_seed(0)
    train = SimpleNamespace(adv_clip_max=5.0, clip_range=0.2, beta=0.01, panw_alpha=0.6)
    grids = ((1, 1), (2, 2), (4, 4))
    shape = VQTokenizerConfig(grids=grids, vocab_size=64, channels=32, channel_multipliers=(1, 2, 2))
    config = VARConfig(grids=grids, depth=2, embed_dim=64, num_heads=2, vocab_size=64, num_classes=10)
    transformer = add_adapters(VAR(config, VQTokenizer(shape).eval()), rank=4).eval()
    optimizer = torch.optim.AdamW([each for each in transformer.parameters() if each.requires_grad], lr=1e-3)
    for epoch in range(epochs):
        sample, images = draw(transformer, torch.full((8,), 3), seed=epoch)
        rewards = images[:, 0].mean((1, 2))  # how red they are
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        sample["advantages"] = advantages[:, None].expand(-1, len(grids))
        out = loss_of(transformer, sample, train)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"reward {rewards.mean():.4f} loss {out.loss.item():+.4f} kl {out.kl.item():.1e}")
    return transformer


if __name__ == "__main__":
    main()
