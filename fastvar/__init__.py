"""fastvar: fused operators, models and reinforcement learning for visual autoregressive (next-scale) image models.

This is not FastVAR, the token-pruning method of arXiv 2503.23367.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A checkout keeps the kernels beside this folder; an installed wheel has them inside it as fastvar/kernels.
if (Path(__file__).parent.parent / "kernels" / "block_causal_attention").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from fastvar.ops import explain, support
    from fastvar.schedule import ScaleSchedule

__version__ = "2026.11.0"
__all__ = ["ScaleSchedule", "__version__", "explain", "support"]

_SUBPACKAGES = ("data", "integrations", "models", "ops", "rl", "training")
_NAMES = {"ScaleSchedule": "fastvar.schedule", "explain": "fastvar.ops", "support": "fastvar.ops"}


def __getattr__(name: str) -> Any:
    # Imported on first use: some need more than torch, and what has to be set before torch comes can still be set.
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastvar.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'fastvar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
