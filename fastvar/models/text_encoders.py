"""Text encoders by name, as commands and saved models know them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastvar.models.character_encoder import CharacterTextEncoder
from fastvar.models.encoded_texts import ABOUT, EncodedTexts
from fastvar.models.t5 import T5TextEncoder
from fastvar.models.text import TextEncoder


def load_text_encoder(
    name: str,
    *,
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The text encoder of a name.

    Args:
        name: "characters", or "characters-C" for C channels instead of 64; a folder that `encode_texts` wrote; else a
            T5, as a folder or by its name on the Hugging Face hub.
        max_length: the most rows of a text; features that were kept have their own.
        dtype, device: of a T5.

    Raises:
        ImportError: a T5 without transformers.
        OSError: there is none of that name.
        ValueError: a damaged folder.
    """
    characters = re.fullmatch(r"characters(?:-(\d+))?", name)
    if characters:
        return CharacterTextEncoder(int(characters[1] or 64), max_length=max_length)
    if (Path(name) / ABOUT).is_file():
        return EncodedTexts(name)
    return T5TextEncoder(name, max_length=max_length, dtype=dtype, device=device)
