"""A data set turned into tokens once, for training without the tokenizer's encoder in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch

from fastvar.bars import progress_bar
from fastvar.models import VQTokenizer
from fastvar.training.batches import seeded


class TokenDataset:
    """Tokens, conditions and reference tokens of every item, in memory.

    Args:
        dataset: items with `image` and optionally `label`, `text`, `reference`.
        tokenizer: encodes them.
        batch_size: images encoded at a time.
        reference: whether to encode the reference images too.
        seed: of what the data set draws at random; each item is drawn once.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: VQTokenizer,
        *,
        batch_size: int = 64,
        reference: bool = False,
        seed: int = 0,
    ) -> None:
        self.classes: list[str] | None = getattr(dataset, "classes", None)
        self.num_classes: int | None = getattr(dataset, "num_classes", None)
        device = next(tokenizer.parameters()).device
        wanted = ("label", "text")
        columns: dict[str, list[Any]] = {}
        # one pass in order; the last batch may be short
        for start in progress_bar(range(0, len(dataset), batch_size), desc="tokens"):
            indices = list(range(start, min(start + batch_size, len(dataset))))
            batch = _batch(dataset, indices, seed)
            row = {name: batch[name] for name in wanted if name in batch}
            row["tokens"] = tokenizer.encode(batch["image"].to(device)).cpu()
            if reference:
                row["reference_tokens"] = tokenizer.encode(batch["reference"].to(device)).cpu()
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
        self.columns: dict[str, Any] = {
            name: torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [v for part in parts for v in part]
            for name, parts in columns.items()
        }
        names = [name for name in ("tokens", "reference_tokens") if name in self.columns]
        self.checksum = crc32(b"".join(self.columns[name].numpy().tobytes() for name in names))

    def __len__(self) -> int:
        return len(self.columns["tokens"])

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The rows of these indices, stacked."""
        rows = torch.as_tensor(indices)
        return {
            name: column[rows] if isinstance(column, torch.Tensor) else [column[i] for i in indices]
            for name, column in self.columns.items()
        }


def _batch(dataset: Any, indices: list[int], seed: int) -> Any:
    if hasattr(dataset, "batch"):
        with seeded(seed, indices[0]):
            return dataset.batch(indices)
    items = []
    for i in indices:
        with seeded(seed, i):
            items.append(dataset[i])
    return torch.utils.data.default_collate(items)
