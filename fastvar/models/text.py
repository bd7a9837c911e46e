"""Text features of several lengths: packed, as a text encoder gives them, and the attention of image tokens to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fastvar.models.linear import Linear
from fastvar.ops._numbers import on_device


class TextFeatures(NamedTuple):
    """What a text encoder says of a batch of texts.

    Attributes:
        packed: (sum of lengths, C), the rows of one text after those of the other.
        lengths: rows of each text, at least 1: the empty text has its end-of-text token.
    """

    packed: torch.Tensor
    lengths: Sequence[int]

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each text."""
        return (0, *accumulate(self.lengths))[:-1]

    def check(self, owner: str, channels: int, longest: int) -> TextFeatures:
        """Itself, with lengths as ints.

        Args:
            owner: "class: argument", as it opens messages.
            channels: C.
            longest: most rows of a text.

        Raises:
            ValueError: another width, lengths that are below 1, above `longest` or do not add up.
        """
        if not isinstance(self.packed, torch.Tensor) or self.packed.ndim != 2 or self.packed.shape[1] != channels:
            got = tuple(self.packed.shape) if isinstance(self.packed, torch.Tensor) else type(self.packed).__name__
            raise ValueError(f"{owner}: expected packed features (sum of lengths, {channels}), got {got}")
        lengths = tuple(int(length) for length in self.lengths)
        if any(not 1 <= length <= longest for length in lengths) or sum(lengths) != len(self.packed):
            raise ValueError(
                f"{owner}: expected lengths from 1 to {longest} that add up to {len(self.packed)}, got {lengths}"
            )
        return TextFeatures(self.packed, lengths)

    @staticmethod
    def joined(parts: Sequence[TextFeatures]) -> TextFeatures:
        """The texts of several batches as one."""
        return TextFeatures(
            torch.cat([part.packed for part in parts]), tuple(length for part in parts for length in part.lengths)
        )

    def some(self, texts: slice) -> TextFeatures:
        """The features of some of the texts."""
        return self.take(range(len(self.lengths))[texts])

    def take(self, texts: Sequence[int]) -> TextFeatures:
        """The features of these texts, in this order; one may come several times."""
        rows, lengths = self.packed.split(list(self.lengths)), tuple(self.lengths)
        return TextFeatures(torch.cat([self.packed[:0], *(rows[i] for i in texts)]), tuple(lengths[i] for i in texts))


class TextEncoder(Protocol):
    """Texts to features: `T5TextEncoder`, `CharacterTextEncoder`, and `EncodedTexts` for features that were kept.

    A text may have any length and any characters. The empty one has a row too; of one that is too long its end is left
    out, with a warning; what is no Unicode, a lone surrogate, counts as a question mark.
    """

    @property
    def name(self) -> str:
        """What `load_text_encoder` finds it by, and features that are kept belong to."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def max_length(self) -> int:
        """The most rows of a text."""

    @property
    def dtype(self) -> torch.dtype:
        """What features lose nothing in; they are float32."""

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Features of texts; they carry no gradient.

        Raises:
            ValueError: something else than a list of texts.
        """


def checked_texts(owner: str, texts: Sequence[str]) -> list[str]:
    """The texts, each in Unicode: a lone surrogate becomes a question mark.

    Args:
        owner: the class, as it opens the message.
        texts: a list of them.

    Raises:
        ValueError: something else, such as a single text.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{owner}: texts: expected a list of texts, got {texts!r}")
    return [text.encode("utf-8", "replace").decode() for text in texts]


class Places(NamedTuple):
    """How packed rows become padded ones.

    Attributes:
        rows: (B, T) int64, the packed row at each place; padding points to some row. None if all texts are of one
            length, so that nothing is padded.
        valid: (B, 1, 1, T) bool, False at padding; None if nothing is padded.
        batch: B.
    """

    rows: torch.Tensor | None
    valid: torch.Tensor | None
    batch: int

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        """(sum of lengths, ...) to (B, T, ...)."""
        if self.rows is not None:
            return packed[self.rows]
        return packed.unflatten(0, (self.batch, len(packed) // max(self.batch, 1)))


class PaddedTexts(NamedTuple):
    """Texts for sampling, whose shape says little of their lengths, so that a CUDA graph serves many prompts.

    Attributes:
        features: (B, T, C), T a power of two or the most rows of a text; what follows a text's end is of no account.
        counts: (B,) int64, the rows of each text.
    """

    features: torch.Tensor
    counts: torch.Tensor

    @property
    def packed(self) -> torch.Tensor:
        """(B T, C)."""
        return self.features.flatten(0, 1)

    @property
    def where(self) -> Places:
        """The places of `packed`, in which nothing moves."""
        place = torch.arange(self.features.shape[1], device=self.counts.device)
        return Places(None, (place < self.counts[:, None])[:, None, None], len(self.counts))

    @staticmethod
    def joined(parts: Sequence[PaddedTexts]) -> PaddedTexts:
        """The texts of several batches as one."""
        most = max(part.features.shape[1] for part in parts)
        features = [F.pad(part.features, (0, 0, 0, most - part.features.shape[1])) for part in parts]
        return PaddedTexts(torch.cat(features), torch.cat([part.counts for part in parts]))


def padded(texts: TextFeatures, longest: int) -> PaddedTexts:
    """Texts of at most `longest` rows, T at least 16 where that is not less; made on their device without a wait."""
    device, lengths = texts.packed.device, tuple(texts.lengths)
    most = min(max(1 << (max(lengths, default=1) - 1).bit_length(), 16), longest)
    counts = on_device(lengths, torch.int64, device)
    place = torch.arange(most, device=device)
    rows = counts.cumsum(0)[:, None] - counts[:, None] + torch.minimum(place, counts[:, None] - 1)
    return PaddedTexts(texts.packed[rows], counts)


# Nothing of these is kept: a CUDA graph may read it, and there is no end of lengths.


def places(lengths: tuple[int, ...], device: torch.device) -> Places:
    """The places of texts of these lengths, made on the device without a wait."""
    if len(set(lengths)) <= 1:
        return Places(None, None, len(lengths))
    counts = on_device(lengths, torch.int64, device)[:, None]
    place = torch.arange(max(lengths), device=device)
    rows = counts.cumsum(0) - counts + torch.minimum(place, counts - 1)
    return Places(rows, (place < counts)[:, None, None], len(lengths))


def row_indices(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The text of each packed row and the row's place in it, (sum of lengths,) int64 each; made as `places` are."""
    counts, total = on_device(lengths, torch.int64, device), sum(lengths)
    text = torch.arange(len(lengths), device=device).repeat_interleave(counts, output_size=total)
    return text, torch.arange(total, device=device) - (counts.cumsum(0) - counts)[text]


class TextKV(NamedTuple):
    """Keys and values of texts for one attention; they do not change over scales.

    Attributes:
        k, v: (B, H, T, D).
        valid: (B, 1, 1, T) bool, False at padding; None if nothing is padded.
    """

    k: torch.Tensor
    v: torch.Tensor
    valid: torch.Tensor | None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TextKV:
        """Those of `function` of each tensor."""
        return TextKV(function(self.k), function(self.v), None if self.valid is None else function(self.valid))


class _Reader(nn.Module):
    """Attention to texts: values have a bias, keys have none."""

    def __init__(self, width: int, text_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = Linear(text_channels, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def keys_and_values(self, packed: torch.Tensor, where: Places) -> TextKV:
        """What queries see of packed rows (sum of lengths, C)."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        device = bias.device.type
        if torch.is_autocast_enabled(device):
            bias = bias.to(torch.get_autocast_dtype(device))
        padded = where.padded(self.kv(packed, bias=bias)).unflatten(2, (2, self.heads, -1))
        k, v = padded.permute(2, 0, 3, 1, 4)
        return TextKV(k, v, where.valid)

    def read(self, q: torch.Tensor, text: TextKV) -> torch.Tensor:
        """Queries (B, n, H, D) to what they make of their texts (B, n, C)."""
        found = F.scaled_dot_product_attention(q.transpose(1, 2), text.k, text.v, attn_mask=text.valid)
        return self.proj(found.transpose(1, 2).flatten(2))


class TextAttention(_Reader):
    """Cross-attention of image tokens (B, n, C) to texts."""

    def __init__(self, width: int, text_channels: int, heads: int) -> None:
        super().__init__(width, text_channels, heads)
        self.query = Linear(width, width)

    def forward(self, h: torch.Tensor, text: TextKV) -> torch.Tensor:
        return self.read(self.query(h).unflatten(2, (self.heads, -1)), text)


class TextPool(_Reader):
    """A text as one row (B, C): attention of a learned query."""

    def __init__(self, width: int, text_channels: int, heads: int) -> None:
        super().__init__(width, text_channels, heads)
        self.query = nn.Parameter(torch.empty(heads, width // heads))

    def forward(self, packed: torch.Tensor, where: Places) -> torch.Tensor:
        text = self.keys_and_values(packed, where)
        query = self.query.to(text.k.dtype).expand(where.batch, 1, -1, -1)
        return self.read(query, text)[:, 0]
