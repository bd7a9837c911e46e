"""All suites, the most important one first: where time is short, the last ones are left out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.cases import PASSES, Setting, Suite
from benchmarks.suites import (
    accumulate_bits,
    accumulate_scale,
    adaptive_layer_norm,
    bitwise_residual_quantize,
    block_causal_attention,
    cached_attention,
    cross_entropy,
    gated_residual,
    gated_residual_norm,
    generate,
    group_norm_silu,
    policy_loss,
    propagate_mask,
    qk_norm_rope,
    qk_norm_rope_into_cache,
    residual_quantize,
    sample_bits,
    sample_tokens,
    subject_step,
    token_log_probs,
    tokenizer_decode,
    tokenizer_encode,
    training_step,
    vmr_grpo_step,
)

SUITES = (
    block_causal_attention.SUITE,
    policy_loss.SUITE,
    residual_quantize.SUITE,
    sample_tokens.SUITE,
    generate.SUITE,
    training_step.SUITE,
    subject_step.SUITE,
    vmr_grpo_step.SUITE,
    cached_attention.SUITE,
    token_log_probs.SUITE,
    cross_entropy.SUITE,
    tokenizer_decode.SUITE,
    tokenizer_encode.SUITE,
    bitwise_residual_quantize.SUITE,
    qk_norm_rope.SUITE,
    qk_norm_rope_into_cache.SUITE,
    adaptive_layer_norm.SUITE,
    gated_residual.SUITE,
    gated_residual_norm.SUITE,
    group_norm_silu.SUITE,
    accumulate_scale.SUITE,
    accumulate_bits.SUITE,
    sample_bits.SUITE,
    propagate_mask.SUITE,
)


def size_of(wish: str) -> str:
    """The size that "auto" or a size stands for here."""
    return ("gpu" if torch.cuda.is_available() else "cpu") if wish == "auto" else wish


def device_of(size: str) -> torch.device:
    """Where a size is measured."""
    return torch.device("cuda" if size == "gpu" else "cpu")


def cases(
    size: str, names: Sequence[str] = (), passes: Sequence[str] = ("forward", "training"), settings: str = "all"
) -> Iterator[tuple[Suite, Setting, str]]:
    """Suites, settings and passes.

    Args:
        size: "tiny", "cpu" or "gpu".
        names: of suites; all by default.
        passes: some of PASSES.
        settings: "first" of each suite, the "rest", or "all".

    Raises:
        ValueError: an unknown name.
    """
    known = [suite.name for suite in SUITES]
    for given, all_names in ((names, known), (passes, PASSES), ((settings,), ("first", "rest", "all"))):
        unknown = sorted(set(given) - set(all_names))
        if unknown:
            raise ValueError(f"benchmarks: expected some of {', '.join(all_names)}, got {', '.join(unknown)}")
    chosen: dict[str, slice] = {"first": slice(1), "rest": slice(1, None), "all": slice(None)}
    for suite in SUITES:
        if names and suite.name not in names:
            continue
        for setting in suite.settings[size][chosen[settings]]:  # type: ignore[index]
            for pass_ in PASSES:
                if pass_ in passes and (pass_ == "forward" or suite.training):
                    whole: dict[str, Any] = {**setting, "size": size}
                    yield suite, whole, pass_
