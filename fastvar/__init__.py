"""fastvar: fused operators, models and reinforcement learning for visual autoregressive (next-scale) image models.

This is not FastVAR, the token-pruning method of arXiv 2503.23367.
"""

from pathlib import Path

# A checkout keeps the kernels beside this folder; an installed wheel has them inside it as fastvar/kernels.
if (Path(__file__).parent.parent / "kernels" / "block_causal_attention").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from fastvar.ops import explain, support
from fastvar.schedule import ScaleSchedule

__version__ = "0.1.0"
__all__ = ["ScaleSchedule", "__version__", "explain", "support"]
