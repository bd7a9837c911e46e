"""Models: tokenizers and transformers over scales, their sampling and the public checkpoints."""

from fastvar.models.checkpoints import load_var
from fastvar.models.graphs import clear_graphs
from fastvar.models.kv_cache import KVCache
from fastvar.models.sampling import Generation, SamplingState
from fastvar.models.var import VAR
from fastvar.models.var_config import VARConfig
from fastvar.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

__all__ = [
    "VAR",
    "Generation",
    "KVCache",
    "SamplingState",
    "VARConfig",
    "VQTokenizer",
    "VQTokenizerConfig",
    "clear_graphs",
    "load_var",
]
