"""The loss of group-relative policy optimisation from hidden states and the head. Peak memory matters as much as time.

All return the loss alone: PPO's clipped surrogate with the KL estimator k3, weighted over tokens. Two cases: "GRPO"
weighs all tokens alike, "VMR-GRPO" by their scale (PANW) and a mask. An Infinity's tokens are bits. Ours also measures
entropies, ratios and shares of the gradient in the same call, Liger-Kernel's losses the KL and the clip fraction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled, own, own_names
from benchmarks.shapes import MODELS
from benchmarks.suites.token_log_probs import (
    attribute,
    bits_in_memory,
    costs,
    head,
    liger_cross_entropy,
    logits_in_memory,
    torch_chunked,
)
from fastvar.ops import PolicyLossOptions, policy_loss, propagate_mask

OP = "policy_loss"
CLIP, KL_WEIGHT = 0.2, 0.1
PANW_ALPHA = {"GRPO": 0.0, "VMR-GRPO": 0.6}
NO_BITS = "knows no tokens of bits"
LIGER_ROWS = 4096  # of hidden states at a time, at least: it takes whole samples, by default one


def weighted_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    ratio, gain = (log_probs - old_log_probs).exp(), advantages[:, None]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
    gap = reference_log_probs - log_probs
    return (weights * (KL_WEIGHT * (gap.expm1() - gap) - surrogate)).sum() / weights.sum()


def from_log_probs(log_probs_of: Contender) -> Contender:
    """The loss in eager PyTorch on top of someone's log-probabilities."""
    if isinstance(log_probs_of, str):
        return log_probs_of

    def call(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        tokens: torch.Tensor,
        token_mask: torch.Tensor,
        per_token: torch.Tensor,
        **rest: torch.Tensor,
    ) -> torch.Tensor:
        return weighted_loss(log_probs_of(hidden, weight, tokens, bias), weights=token_mask * per_token, **rest)

    return call


def liger_fused(device: torch.device, samples: int) -> Contender:
    """Liger-Kernel's LigerFusedLinearGRPOLoss, some samples at a time, gradients computed in the forward pass.

    Its normalisation "dapo" is our "per_segment": the sum over tokens, weighted with the attention mask, by the sum of
    that mask. A mask of numbers other than 0 and 1 therefore weighs tokens as PANW does.
    """
    # plain PyTorch, runs on a CPU too
    loss_class = attribute("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", torch.device("cuda"))
    if isinstance(loss_class, str):
        return loss_class
    loss = loss_class(
        beta=KL_WEIGHT,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="dapo",
        chunk_size=samples,
        compiled=device.type == "cuda",
    )

    def call(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        tokens: torch.Tensor,
        advantages: torch.Tensor,
        old_log_probs: torch.Tensor,
        reference_log_probs: torch.Tensor,
        token_mask: torch.Tensor,
        per_token: torch.Tensor,
    ) -> torch.Tensor:
        weights = token_mask * per_token
        return loss(hidden, weight, tokens, weights, advantages, bias, reference_log_probs, old_log_probs)[0]

    return call


def liger_on_logits(device: torch.device) -> Contender:
    """Liger-Kernel's triton_grpo_loss: the logits stay in memory, their gradient takes their place.

    It wants logits of one position more, hence the padding. It returns a loss for each token, which PANW can weigh.
    """
    function = attribute("liger_kernel.transformers.grpo_loss", "triton_grpo_loss", device)
    if isinstance(function, str):
        return function

    def call(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        tokens: torch.Tensor,
        advantages: torch.Tensor,
        old_log_probs: torch.Tensor,
        reference_log_probs: torch.Tensor,
        token_mask: torch.Tensor,
        per_token: torch.Tensor,
    ) -> torch.Tensor:
        losses = function(
            F.linear(F.pad(hidden, (0, 0, 0, 1)), weight, bias),
            old_log_probs,
            reference_log_probs,
            tokens,
            advantages,
            token_mask,
            temperature=1.0,
            beta=KL_WEIGHT,
            eps_low=CLIP,
            eps_high=CLIP,
            reduce=False,
        )[0]
        return (losses * per_token).sum() / (token_mask * per_token).sum()

    return call


def build(setting: Setting, device: torch.device) -> Problem:
    hidden, weight, tokens = head(setting, device)
    bias = torch.randn(len(weight), device=device).to(weight.dtype)
    schedule, alpha = MODELS[setting["model"]].schedule, PANW_ALPHA[setting["case"]]
    batch, length = tokens.shape[:2]
    log_probs_of = bits_in_memory if tokens.ndim == 3 else logits_in_memory
    with torch.no_grad():
        log_probs = log_probs_of(hidden, weight, tokens, bias)
    # Ratios well within the clip's bounds or well beyond them, so that rounding does not decide who has a gradient.
    steps = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=device)
    mask = torch.ones(batch, length, device=device)
    if alpha:  # only the left half of the image matters
        finest = torch.zeros(batch, *schedule.finest, device=device)
        finest[..., : schedule.finest[1] // 2] = 1
        mask = propagate_mask(finest, schedule).to(mask.dtype)
    factors = [float(h * w) ** -alpha for h, w in schedule]
    inputs = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "tokens": tokens,
        # their mean is not 0, so that the loss is of order 1 and its relative error tells something
        "advantages": 1 + torch.randn(batch, device=device),
        "old_log_probs": log_probs - steps[torch.randint(4, log_probs.shape, device=device)],
        "reference_log_probs": log_probs + 0.3 * torch.randn(batch, length, device=device),
        "token_mask": mask,
        # the PANW weight of each token, the same at each call: what the rivals have in place of a schedule
        "per_token": torch.tensor([factors[k] for k in schedule.scale_of_token], device=device),
    }

    options = PolicyLossOptions(panw_alpha=alpha, clip_low=CLIP, clip_high=CLIP, kl_weight=KL_WEIGHT, kl_estimator="k3")

    def ours(
        hidden: Any, weight: Any, bias: Any, tokens: Any, advantages: Any, per_token: Any, **rest: Any
    ) -> torch.Tensor:
        return policy_loss((hidden, weight, bias), tokens, advantages, schedule, options, **rest).loss

    eager = from_log_probs(log_probs_of)
    assert isinstance(eager, Callable)
    contenders, backend = own(OP, hidden, ours)
    of_classes: dict[str, Contender] = {
        "torch linear_cross_entropy": from_log_probs(torch_chunked()),
        "Liger fused linear cross-entropy": from_log_probs(liger_cross_entropy(device)),
        "Liger fused linear GRPO": liger_fused(device, -(-LIGER_ROWS // length)),
        "Liger GRPO on logits": liger_on_logits(device),
    }
    contenders |= {"logits in memory": eager, "torch.compile": compiled(eager, setting)}
    contenders |= dict.fromkeys(of_classes, NO_BITS) if tokens.ndim == 3 else of_classes
    return Problem(
        inputs,
        contenders,
        backend=backend,
        gradients=("hidden", "weight", "bias"),
        reference=eager,
        **costs(hidden, weight),
    )


SUITE = Suite(
    OP,
    {
        "tiny": [
            {"model": "tiny", "batch": 4, "case": "GRPO", "dtype": "float32"},
            {"model": "tiny", "batch": 4, "case": "VMR-GRPO", "dtype": "float32"},
            {"model": "Infinity-tiny", "batch": 4, "case": "VMR-GRPO", "dtype": "float32"},
        ],
        "cpu": [
            {"model": "VAR-d16", "batch": 2, "case": "VMR-GRPO", "dtype": "float32"},
            {"model": "Infinity-2B-0.06M", "batch": 2, "case": "VMR-GRPO", "dtype": "float32"},
        ],
        "gpu": [
            {"model": "VAR-d30", "batch": 64, "case": "GRPO", "dtype": "bfloat16"},
            {"model": "VAR-d30", "batch": 64, "case": "VMR-GRPO", "dtype": "bfloat16"},
            {"model": "VAR-d16", "batch": 64, "vocabulary": 16384, "case": "GRPO", "dtype": "bfloat16"},
            {"model": "Infinity-2B-0.25M", "batch": 16, "case": "VMR-GRPO", "dtype": "bfloat16"},
        ],
    },
    (
        *own_names(OP),
        "logits in memory",
        "torch.compile",
        "torch linear_cross_entropy",
        "Liger fused linear cross-entropy",
        "Liger fused linear GRPO",
        "Liger GRPO on logits",
    ),
    build,
    training=True,
)
