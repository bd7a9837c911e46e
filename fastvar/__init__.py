"""fastvar: fused operators, models and reinforcement learning for visual autoregressive (next-scale) image models.

This is not FastVAR, the token-pruning method of arXiv 2503.23367.
"""

import importlib
from pathlib import Path
from typing import Any

# A checkout keeps the kernels beside this folder; an installed wheel has them inside it as fastvar/kernels.
if (Path(__file__).parent.parent / "kernels" / "block_causal_attention").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from fastvar.ops import explain, support
from fastvar.schedule import ScaleSchedule

__version__ = "0.1.0"
__all__ = ["ScaleSchedule", "__version__", "explain", "support"]

_SUBPACKAGES = ("data", "models", "rl", "training")


def __getattr__(name: str) -> Any:
    # fastvar.models and its like are imported on first use: they need more than torch
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastvar.{name}")
    raise AttributeError(f"module 'fastvar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
