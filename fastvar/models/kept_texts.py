"""A text encoder that remembers: what it said of a text is kept on the CPU and not computed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from fastvar.models.text import TextEncoder, TextFeatures, checked_texts


class KeptTexts:
    """A text encoder's features, kept by text in the encoder's dtype; those asked for longest ago make room.

    Args:
        encoder: makes features of texts that are not kept.
        most_bytes: of all that is kept.
    """

    def __init__(self, encoder: TextEncoder, most_bytes: int = 2**30) -> None:
        self.encoder, self.most_bytes = encoder, most_bytes
        self.name, self.channels, self.max_length = encoder.name, encoder.channels, encoder.max_length
        self.dtype: torch.dtype = encoder.dtype
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Features of texts, on the CPU.

        Raises:
            ValueError: something else than a list of texts.
        """
        asked = checked_texts("KeptTexts", texts)
        new = [text for text in dict.fromkeys(asked) if text not in self._kept]
        found = {text: self._kept[text] for text in asked if text in self._kept}
        if new:
            features = self.encoder(new)
            rows = features.packed.to("cpu", self.dtype).split(list(features.lengths))
            found |= {text: own.clone() for text, own in zip(new, rows, strict=True)}
        for text, own in found.items():
            if text in new:
                self._kept[text] = own
                self._bytes += own.nbytes
            self._kept.move_to_end(text)
        while self._bytes > self.most_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        packed = torch.cat([torch.empty(0, self.channels, dtype=self.dtype), *(found[text] for text in asked)])
        return TextFeatures(packed.float(), tuple(len(found[text]) for text in asked))
