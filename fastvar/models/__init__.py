"""Models: tokenizers and transformers over scales, their sampling and the public checkpoints."""

from fastvar.models.bitwise_loss import bitwise_loss, scale_weights
from fastvar.models.bsq_tokenizer import BSQTokenizer, BSQTokenizerConfig, self_correction
from fastvar.models.character_encoder import CharacterTextEncoder
from fastvar.models.checkpoints import load_var
from fastvar.models.encoded_texts import EncodedTexts, encode_texts
from fastvar.models.graphs import clear_graphs
from fastvar.models.infinity import Infinity
from fastvar.models.infinity_block import rotation_grid
from fastvar.models.infinity_checkpoints import load_infinity
from fastvar.models.infinity_config import InfinityConfig
from fastvar.models.kv_cache import KVCache
from fastvar.models.next_scale import Model, NextScaleModel
from fastvar.models.sampling import Generation, SamplingOptions, SamplingState, state_after
from fastvar.models.t5 import T5TextEncoder
from fastvar.models.text import TextEncoder, TextFeatures
from fastvar.models.text_encoders import load_text_encoder
from fastvar.models.var import VAR
from fastvar.models.var_config import VARConfig
from fastvar.models.vq_tokenizer import VQTokenizer, VQTokenizerConfig

__all__ = [
    "VAR",
    "BSQTokenizer",
    "BSQTokenizerConfig",
    "CharacterTextEncoder",
    "EncodedTexts",
    "Generation",
    "Infinity",
    "InfinityConfig",
    "KVCache",
    "Model",
    "NextScaleModel",
    "SamplingOptions",
    "SamplingState",
    "T5TextEncoder",
    "TextEncoder",
    "TextFeatures",
    "VARConfig",
    "VQTokenizer",
    "VQTokenizerConfig",
    "bitwise_loss",
    "clear_graphs",
    "encode_texts",
    "load_infinity",
    "load_text_encoder",
    "load_var",
    "rotation_grid",
    "scale_weights",
    "self_correction",
    "state_after",
]
