"""Characters as a text encoder: fixed features, nothing learned and nothing to download."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from fastvar.models.text import TextFeatures, checked_texts

logger = logging.getLogger("fastvar")


class CharacterTextEncoder:
    """Each character of a text and its place, for models that write what they are told letter by letter.

    A text has a row for each character (a Unicode code point) and one for its end. The first half of a row's channels
    are -1 and 1, drawn from a hash of the character; the second half are sines and cosines of its place. The same text
    has the same features everywhere. A text of more than `max_length` - 1 characters loses its last ones, with a
    warning; a lone surrogate counts as a question mark.

    Args:
        channels: C, a multiple of 4.
        max_length: the most rows of a text.

    Raises:
        ValueError: other channels, no row.
    """

    dtype = torch.float32

    def __init__(self, channels: int = 64, *, max_length: int = 512) -> None:
        if channels < 4 or channels % 4:
            raise ValueError(f"CharacterTextEncoder: channels: expected a multiple of 4, got {channels}")
        if max_length < 1:
            raise ValueError(f"CharacterTextEncoder: max_length: expected at least 1, got {max_length}")
        self.channels, self.max_length = channels, max_length

    @property
    def name(self) -> str:
        """ "characters-C"."""
        return f"characters-{self.channels}"

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Features of texts, float32 on the CPU.

        Raises:
            ValueError: something else than a list of texts.
        """
        rows = [self._rows(text) for text in checked_texts("CharacterTextEncoder", texts)]
        packed = torch.cat([torch.empty(0, self.channels), *rows])
        return TextFeatures(packed, tuple(len(of_text) for of_text in rows))

    def _rows(self, text: str) -> torch.Tensor:
        kept = text[: self.max_length - 1]
        if len(kept) < len(text):
            logger.warning(
                "CharacterTextEncoder: a text of %d characters is cut to %d: %.60r...", len(text), len(kept), text
            )
        half = self.channels // 2
        signs = np.stack([_signs(character, half) for character in (*kept, "")])  # "" is the end
        place = torch.arange(len(signs), dtype=torch.float64)[:, None]
        angles = place * 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        return torch.cat([torch.from_numpy(signs), angles.sin().float(), angles.cos().float()], 1)


@lru_cache(maxsize=4096)
def _signs(character: str, count: int) -> np.ndarray:
    digest = hashlib.shake_256(character.encode()).digest(-(-count // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8), count=count).astype(np.float32) * 2 - 1
