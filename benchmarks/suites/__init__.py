"""All suites of this folder, the most important one first: where time is short, the last ones are left out."""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from benchmarks.cases import PASSES, Setting, Suite

# Those that are not named here come last.
_FIRST = (
    "block_causal_attention", "policy_loss", "residual_quantize", "sample_tokens", "generate", "training_step",
    "subject_step", "vmr_grpo_step", "cached_attention", "token_log_probs", "cross_entropy", "tokenizer_decode",
    "tokenizer_encode", "bitwise_residual_quantize", "qk_norm_rope", "qk_norm_rope_into_cache", "adaptive_layer_norm",
    "gated_residual", "gated_residual_norm", "group_norm_silu", "accumulate_scale", "accumulate_bits", "sample_bits",
    "propagate_mask",
)  # fmt: skip
_NAMES = [module.name for module in iter_modules(__path__)]
SUITES: tuple[Suite, ...] = tuple(
    import_module(f"{__name__}.{name}").SUITE
    for name in sorted(_NAMES, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
)


def size_of(asked: str) -> str:
    """The size that "auto" or a size stands for here."""
    return ("gpu" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


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
