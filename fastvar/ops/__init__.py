"""The operators: one public function each, with `backend="auto" | "reference" | "cpu" | "triton" | "cuda"`."""

from fastvar.ops._dispatch import explain, support
from fastvar.ops.adaptive_layer_norm import adaptive_layer_norm, gated_residual

__all__ = [
    "adaptive_layer_norm",
    "explain",
    "gated_residual",
    "support",
]
