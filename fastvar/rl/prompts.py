"""What a policy is asked for: texts for the rewards, conditions for the model, reference subjects for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import torch

from fastvar.models import Model
from fastvar.models.var import VAR, Labels
from fastvar.rl.rows import taken


@dataclass(frozen=True)
class Prompts:
    """N prompts.

    Attributes:
        texts: (N,) what each image should show; rewards read them.
        labels: (N,) class indices or texts, the model's condition; None for the texts themselves.
        references: (N, 3, H, W) in [0, 1], the reference subjects of a model with a subject prefix, or None.

    Raises:
        ValueError: no prompt, or columns of different lengths.
    """

    texts: Sequence[str]
    labels: Labels | None = None
    references: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or not len(self.texts):
            raise ValueError(f"Prompts: texts: expected at least one, in a list, got {self.texts!r}")
        for name in ("labels", "references"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.texts):
                raise ValueError(f"Prompts: {name}: expected one for each of {len(self.texts)}, got {len(column)}")
        if self.references is not None and not isinstance(self.references, torch.Tensor):
            raise ValueError(f"Prompts: references: expected a tensor, got {type(self.references).__name__}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def conditions(self) -> Labels:
        """(N,) what the model is conditioned on."""
        return self.texts if self.labels is None else self.labels

    def take(self, rows: Sequence[int]) -> Prompts:
        """The prompts of these rows, in this order; a row may come several times."""

        texts = [self.texts[i] for i in rows]
        labels: Labels | None = self.labels
        if labels is not None:
            labels = taken(labels, rows) if isinstance(labels, torch.Tensor) else [labels[i] for i in rows]
        references = None if self.references is None else taken(self.references, rows)
        return Prompts(texts, labels, references)

    @classmethod
    def joined(cls, parts: Sequence[Prompts]) -> Prompts:
        """The prompts of several, one after the other."""
        labels = [part.labels for part in parts]
        references = [part.references for part in parts]
        if labels[0] is None:
            together: Labels | None = None
        elif isinstance(labels[0], torch.Tensor):
            together = torch.cat(labels)  # type: ignore[arg-type]
        else:
            together = [label for column in labels for label in column]  # type: ignore[union-attr]
        return cls(
            [text for part in parts for text in part.texts],
            together,
            None if references[0] is None else torch.cat(references),  # type: ignore[arg-type]
        )

    def fingerprint(self) -> int:
        """A checksum of texts, labels and references, by which a run knows its prompts again."""
        labels = self.labels.tolist() if isinstance(self.labels, torch.Tensor) else self.labels
        checksum = crc32(json.dumps([list(self.texts), None if labels is None else list(labels)]).encode())
        if self.references is not None:
            checksum = crc32(self.references.detach().cpu().contiguous().view(torch.uint8).numpy().data, checksum)
        return checksum

    def repeated(self, times: int) -> Prompts:
        """Each prompt `times` times, the copies adjacent."""
        return self.take([i for i in range(len(self)) for _ in range(times)])


class PromptSource(Protocol):
    """A callable that makes prompts for a model; it may take more options by name."""

    def __call__(self, var: VAR, count: int, *, split: str) -> Prompts:
        """At most `count` prompts of a split, "train" or "test"."""


def subject_of(model: Model, prompts: Prompts) -> torch.Tensor | None:
    """(N, L, C) pyramids of the references, as `generate` takes them; None without references.

    Raises:
        ValueError: references for a model without a subject prefix.
    """
    if prompts.references is None:
        return None
    if model.config.subject == "none":
        raise ValueError("Prompts: references: expected None, as the model has no subject prefix")
    images = prompts.references.to(model.device, non_blocking=True) * 2 - 1
    return model.pyramid(model.tokenizer.encode(images))
