"""Log-probabilities of tokens from hidden states and the head. Peak memory matters as much as time.

"entropy" asks for each token's entropy as well, with its gradient. Ours computes it in any case, a rival only then.
Heads have no bias here, because two of the rivals know none.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import Contender, Problem, Setting, Suite
from benchmarks.rivals import compiled, missing_package, own, own_names
from benchmarks.shapes import MODELS
from fastvar.ops import token_log_probs

OP = "token_log_probs"
NO_ENTROPY = "has no entropy"


def log_softmax(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """All logits in the inputs' dtype, and their log_softmax in float32."""
    logits = F.linear(hidden, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def logits_in_memory(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return log_softmax(hidden, weight, bias).gather(-1, tokens[..., None])[..., 0]


def bits_in_memory(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same of bits, by their logits in float32."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.logsigmoid(torch.where(tokens, logits, -logits)).sum(-1)


def logits_in_memory_with_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = log_softmax(hidden, weight, None)
    return log_probs.gather(-1, tokens[..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)


def attribute(module: str, name: str, device: torch.device) -> Any:
    """A function of a package that may be missing, or why it cannot compete, a string."""
    obstacle = missing_package(module.partition(".")[0], device)
    if obstacle is not None:
        return obstacle
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as missing:
        return f"{type(missing).__name__}: {missing}"


def torch_chunked() -> Contender:
    """PyTorch's linear_cross_entropy, some rows at a time; the backward pass computes their logits anew."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        return f"PyTorch {torch.__version__} has no linear_cross_entropy in chunks"
    options = nn.LinearCrossEntropyOptions()

    def call(
        hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        losses = F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, tokens.flatten(), linear_bias=bias, reduction="none", options=options
        )
        return -losses.view(tokens.shape)

    return call


def liger_cross_entropy(device: torch.device) -> Contender:
    """Liger-Kernel's fused linear cross-entropy, the weight's gradient summed in float32, as ours is."""
    loss_class = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", device)
    if isinstance(loss_class, str):
        return loss_class
    loss = loss_class(reduction="none", accum_dtype=torch.float32)

    def call(
        hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return -loss(weight, hidden.flatten(0, 1), tokens.flatten(), bias).view(tokens.shape)

    return call


def liger_scaled_cross_entropy(entropy: bool) -> Contender:
    """Liger-Kernel's cross-entropy with entropies: CuTe on Hopper, elsewhere PyTorch, 512 rows at a time."""
    # runs on a CPU too
    function = attribute("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction", torch.device("cuda"))
    if isinstance(function, str):
        return function

    def call(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> Any:
        found = function.apply(hidden.flatten(0, 1), weight, tokens.flatten(), 1.0, -100, 1, entropy)
        losses = found[0] if entropy else found
        own_scores = -losses.view(tokens.shape)
        return (own_scores, found[1].view(tokens.shape)) if entropy else own_scores

    return call


def cut_cross_entropy(device: torch.device) -> Contender:
    """Apple's Cut Cross-Entropy with all gradients; by default it leaves out the small ones."""
    function = attribute("cut_cross_entropy", "linear_cross_entropy", device)
    if isinstance(function, str):
        return function

    def call(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        losses = function(hidden.flatten(0, 1), weight, tokens.flatten(), reduction="none", filter_eps=None)
        return -losses.view(tokens.shape)

    return call


def head(setting: Setting, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (B, L, E), the head's weight (V, E) and tokens (B, L), or bits (B, L, d) and a weight (d, E); the
    logits' standard deviation is 2."""
    dtype, shape = getattr(torch, setting["dtype"]), MODELS[setting["model"]]
    size = setting.get("vocabulary", shape.vocab_size or shape.channels)
    hidden = torch.randn(setting["batch"], shape.tokens, shape.width, device=device).to(dtype)
    weight = (torch.randn(size, shape.width, device=device) * 2 * shape.width**-0.5).to(dtype)
    if not shape.vocab_size:
        return hidden, weight, torch.rand(*hidden.shape[:2], size, device=device) < 0.5
    return hidden, weight, torch.randint(size, hidden.shape[:2], device=device)


def costs(hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """The product with the head, and twice that in the backward pass: an implementation that computes the logits anew
    does more, which is not needed. Each pass reads both inputs, the backward pass writes both gradients."""
    flops = 2.0 * hidden.numel() * len(weight)
    size = float(hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size())
    return {"flops": flops, "bytes": size, "training_flops": 3 * flops, "training_bytes": 3 * size}


def build(setting: Setting, device: torch.device) -> Problem:
    hidden, weight, tokens = head(setting, device)
    entropy = bool(setting["entropy"])

    def ours(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, backend: str) -> Any:
        found = token_log_probs(hidden, weight, None, tokens, backend=backend)
        return (found.log_probs, found.entropy) if entropy else found.log_probs

    eager: Callable[..., Any] = logits_in_memory_with_entropy if entropy else logits_in_memory
    contenders, backend = own(OP, hidden, ours)
    contenders |= {
        "logits in memory": eager,
        "torch.compile": compiled(eager, setting),
        "torch linear_cross_entropy": NO_ENTROPY if entropy else torch_chunked(),
        "Liger fused linear cross-entropy": NO_ENTROPY if entropy else liger_cross_entropy(device),
        "Liger scaled cross-entropy": liger_scaled_cross_entropy(entropy),
        "Cut Cross-Entropy": NO_ENTROPY if entropy else cut_cross_entropy(device),
    }
    return Problem(
        {"hidden": hidden, "weight": weight, "tokens": tokens},
        contenders,
        backend=backend,
        gradients=("hidden", "weight"),
        reference=eager,
        **costs(hidden, weight),
    )


SUITE = Suite(
    OP,
    {
        "tiny": [
            {"model": "tiny", "batch": 2, "entropy": False, "dtype": "float32"},
            {"model": "tiny", "batch": 2, "entropy": True, "dtype": "float32"},
        ],
        "cpu": [{"model": "VAR-d16", "batch": 2, "entropy": False, "dtype": "float32"}],
        "gpu": [
            {"model": "VAR-d30", "batch": 64, "entropy": False, "dtype": "bfloat16"},
            {"model": "VAR-d16", "batch": 64, "entropy": True, "dtype": "bfloat16"},
            {"model": "VAR-d16", "batch": 64, "vocabulary": 16384, "entropy": False, "dtype": "bfloat16"},
        ],
    },
    (
        *own_names(OP),
        "logits in memory",
        "torch.compile",
        "torch linear_cross_entropy",
        "Liger fused linear cross-entropy",
        "Liger scaled cross-entropy",
        "Cut Cross-Entropy",
    ),
    build,
    training=True,
)
