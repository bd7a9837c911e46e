"""The shape of a VAR and the characters of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from fastvar.models.injection import SUBJECTS
from fastvar.ranges import Count, CountOrNone, NotNegative, Number, OneOf, Positive, Share, ShareBelowOne, check_fields
from fastvar.schedule import VAR_256, ScaleSchedule


@dataclass(frozen=True)
class VARConfig:
    """Shape of a `VAR`; the defaults are those of the public VAR-d16."""

    grids: tuple[tuple[int, int], ...] = VAR_256.grids
    """Token grids (height, width), coarse to fine."""
    depth: Count = 16
    embed_dim: Count = 1024
    num_heads: Count = 16
    mlp_ratio: Positive = 4.0
    vocab_size: Count = 4096
    code_channels: Count = 32
    """Channels of the tokenizer's feature map."""
    num_classes: CountOrNone = 1000
    """Class condition; 0 for a text condition."""
    class_names: tuple[str, ...] = ()
    """Class condition: what the classes are called, in the order of their indices; empty if nobody knows."""
    text_length: CountOrNone = 0
    """Text condition: the most characters of a text; 0 for a class condition."""
    alphabet: str = "0123456789"
    """Text condition: the characters that a text may have."""
    subject: Annotated[str, OneOf(*SUBJECTS)] = "none"
    """Prefix of a reference subject: "none"; all its scales, "block_causal" (a prefix token sees the prefix's coarser
    scales and its own) or "bidirectional" (it sees all of the prefix); "last_scale" (the finest alone); "interleaved"
    (scale k of the image sees the subject's up to k). See `fastvar.models.injection`."""
    subject_own_tokens: bool = False
    """Whether each scale of the subject is the codes of its own tokens, instead of the complete feature map at its
    grid; see `NextScaleModel.pyramid`."""
    shared_adaln: bool = False
    """One modulation of all blocks plus a table per block, instead of a linear layer per block."""
    qk_l2_norm: bool = True
    """Unit-length queries and keys with a learned scale per head; otherwise scores are scaled by 0.25 / sqrt(D)."""
    gate_init: Number = 0.0
    """Where the residual gates start. From 0 a block begins as the identity, which deep models need; small ones that
    are trained for a few minutes learn faster from 1."""
    norm_eps: NotNegative = 1e-6
    condition_dropout: Share = 0.1
    """Share of training samples whose condition is dropped, for guidance."""
    subject_dropout: Share = 0.1
    """Share of training groups whose subject is dropped; half of their samples lose the condition too, as the
    unconditional side of guidance has neither."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of the last block, growing linearly over the blocks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", ScaleSchedule(self.grids).grids)
        check_fields(self)
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"VARConfig: num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.num_heads}"
            )
        if (self.num_classes > 0) == (self.text_length > 0):
            raise ValueError(
                "VARConfig: num_classes, text_length: expected exactly one above 0, "
                f"got {self.num_classes} and {self.text_length}"
            )

        if self.class_names and len(set(self.class_names)) != self.num_classes:
            raise ValueError(
                f"VARConfig: class_names: expected {self.num_classes} different ones, one for each class, "
                f"got {len(self.class_names)}: {self._some_names()}"
            )

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.grids)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def encode_classes(self, names: Sequence[str]) -> torch.Tensor:
        """Class names to indices (B,) int64.

        Raises:
            ValueError: a model whose classes have no names, a name that it does not have.
        """
        if not self.class_names:
            raise ValueError("VAR: labels: expected a tensor of class indices, as this model has a class condition")
        if isinstance(names, str):
            raise ValueError(f"VAR: labels: expected a list of class names, got the text {names!r}")
        places = {name: i for i, name in enumerate(self.class_names)}
        for name in names:
            if name not in places:
                raise ValueError(f"VAR: labels: expected class names out of {self._some_names()}, got {name!r}")
        return torch.tensor([places[name] for name in names], dtype=torch.int64)

    def class_index(self, label: str) -> int:
        """The index of a class that a user names, or counts from 0; a class that is called "7" comes before the index.

        Raises:
            ValueError: neither.
        """
        if label in self.class_names:
            return self.class_names.index(label)
        if label.isdecimal() and int(label) < self.num_classes:
            return int(label)
        names = f"one of {self._some_names()} or " if self.class_names else ""
        raise ValueError(f"expected {names}a class index from 0 to {self.num_classes - 1}, got {label!r}")

    def _some_names(self) -> str:
        """The class names, unless they fill the screen."""
        return ", ".join(map(repr, self.class_names[:20])) + (", ..." if len(self.class_names) > 20 else "")

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to character indices (B, text_length) int64; shorter texts are padded on the right.

        Raises:
            ValueError: no text condition, a text that is too long or has a character outside the alphabet.
        """
        if not self.text_length:
            raise ValueError("VAR: labels: expected a tensor of class indices, as this model has a class condition")
        if isinstance(texts, str):  # a sequence of texts of one character
            raise ValueError(f"VAR: labels: expected a list of texts, got the text {texts!r}")
        rows = []
        for text in texts:
            if not isinstance(text, str) or len(text) > self.text_length or any(c not in self.alphabet for c in text):
                raise ValueError(
                    f"VAR: labels: expected texts of at most {self.text_length} characters out of "
                    f"{self.alphabet!r}, got {text!r}"
                )
            indices = [self.alphabet.index(c) for c in text]
            rows.append(indices + [len(self.alphabet)] * (self.text_length - len(indices)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.text_length)
