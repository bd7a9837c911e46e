"""T5 as a text encoder, through transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from fastvar.installation import install_command
from fastvar.models.text import TextFeatures, checked_texts

logger = logging.getLogger("fastvar")


class T5TextEncoder:
    """Texts to the last hidden states of a T5 encoder; the public Infinity takes google/flan-t5-xl.

    A text has as many rows as tokens, the end-of-text token included, so that the empty text has one. A text of more
    than `max_length` tokens loses those before its end-of-text token that are too many, with a warning. What is no
    Unicode, a lone surrogate, becomes a question mark.

    Args:
        source: a folder, or a name on the Hugging Face hub, from which it is loaded.
        max_length: the most tokens of a text; 512 as in Infinity.
        dtype: to load the weights in. In float16 T5 is known to overflow.
        device: where it runs.
        options: of the hub, such as `revision` or `local_files_only`.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        max_length: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise ImportError(f"T5TextEncoder: needs transformers: {install_command('text')}") from error
        if max_length < 1:
            raise ValueError(f"T5TextEncoder: max_length: expected at least 1, got {max_length}")
        self.name, self.max_length = str(source), max_length
        self.tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
        self.model = T5EncoderModel.from_pretrained(str(source), dtype=dtype, **options).eval().requires_grad_(False)
        self.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Itself, on that device."""
        self.model.to(device)
        return self

    @property
    def channels(self) -> int:
        """C, the width of the features."""
        return self.model.config.d_model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the features were computed."""
        return self.model.dtype

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Features of texts, float32.

        Raises:
            ValueError: something else than a list of texts.
        """
        tokens = [self._tokens(text) for text in checked_texts("T5TextEncoder", texts)]
        device = self.model.device
        if not tokens:
            return TextFeatures(torch.empty(0, self.channels, device=device), ())
        lengths = tuple(len(row) for row in tokens)
        longest = max(lengths)
        ids = torch.tensor([row + [self.tokenizer.pad_token_id or 0] * (longest - len(row)) for row in tokens])
        mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
        with torch.autocast(device.type, enabled=False):
            states = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        rows = [row[:length] for row, length in zip(states.float(), lengths, strict=True)]
        return TextFeatures(torch.cat(rows), lengths)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= self.max_length:
            return ids
        logger.warning("T5TextEncoder: a text of %d tokens is cut to %d: %.60r...", len(ids), self.max_length, text)
        return ids[: self.max_length - 1] + ids[-1:]
