"""Text features that were computed once and are kept on disk, so that training needs no text encoder in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastvar.bars import progress_bar
from fastvar.files import read_json_object, replacing, write_json
from fastvar.models.text import TextEncoder, TextFeatures, checked_texts

ABOUT = "texts.json"
_SHARD = "texts-{:05}.safetensors"
_NAMED = 3  # how many texts an error names


def encode_texts(
    encoder: TextEncoder, texts: Iterable[str], folder: Path, *, batch_size: int = 32, shard_size: int = 4096
) -> int:
    """Compute features of texts and keep them in a folder; `EncodedTexts` reads them.

    Texts that the folder has already are left out, so that an interrupted call goes on where it stopped and more texts
    can be added later. The folder has a safetensors file a shard, each of which appears whole: `packed` (sum of
    lengths, C) in the encoder's dtype, `lengths` (n,) int32 and `digests` (n, 16) uint8, hashes (BLAKE2b of UTF-8) of
    the texts; and `texts.json`, which names the encoder.

    Args:
        encoder: makes the features.
        texts: any number of them; of equal ones the first is kept.
        folder: where to.
        batch_size: texts encoded at a time; those of a shard are sorted by length first.
        shard_size: texts of a file.

    Returns:
        how many were encoded.

    Raises:
        ValueError: the folder has features of another encoder, dtype or longest length.
        OSError: a file could not be written.
    """
    about = {
        "text_encoder": encoder.name,
        "channels": encoder.channels,
        "max_length": encoder.max_length,
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }
    if (folder / ABOUT).is_file():
        before = read_json_object(folder / ABOUT, "encode_texts: folder")
        if before != about:
            raise ValueError(f"encode_texts: folder: expected {before}, as {folder} has, got {about}")
    else:
        write_json(folder / ABOUT, about)
    kept = EncodedTexts(folder)
    left = kept.missing(list(texts))
    first = int(kept.shards[-1].stem.rpartition("-")[2]) + 1 if kept.shards else 0
    for number in progress_bar(range(-(-len(left) // shard_size)), desc="texts"):
        part = sorted(left[number * shard_size : (number + 1) * shard_size], key=len)
        found = TextFeatures.joined([encoder(part[i : i + batch_size]) for i in range(0, len(part), batch_size)])
        tensors = {
            "packed": found.packed.to("cpu", encoder.dtype).contiguous(),
            "lengths": torch.tensor(found.lengths, dtype=torch.int32),
            "digests": torch.from_numpy(_digests(part).view(np.uint8).reshape(-1, 16)),
        }
        with replacing(folder / _SHARD.format(first + number)) as temporary:
            save_file(tensors, temporary)
    return len(left)


class EncodedTexts:
    """The features that `encode_texts` has kept, as a text encoder for these texts alone.

    Files are mapped into memory: only the rows of the texts that are asked for are read. A text is found by its hash.

    Args:
        folder: that `encode_texts` wrote.

    Attributes:
        name, channels, max_length, dtype: of the encoder that made the features.
        shards: the files.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ABOUT).is_file():
            raise FileNotFoundError(f"EncodedTexts: folder: expected a folder with {ABOUT}, got {folder}")
        about = read_json_object(self.folder / ABOUT, "EncodedTexts: folder")
        try:
            self.name = str(about["text_encoder"])
            self.channels, self.max_length = int(about["channels"]), int(about["max_length"])
            self.dtype: torch.dtype = getattr(torch, about["dtype"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"EncodedTexts: folder: {self.folder / ABOUT}: damaged file: {error!r}") from error
        self.shards = sorted(self.folder.glob(_SHARD.replace("{:05}", "*")))
        opened = [self._opened(path) for path in self.shards]
        self._packed = [packed for packed, _, _ in opened]
        lengths = [counts for _, counts, _ in opened]
        none = np.zeros(0, np.int64)
        self._shard = np.concatenate([none, *(np.full(len(n), i) for i, n in enumerate(lengths))])
        self._start = np.concatenate([none, *(n.cumsum() - n for n in lengths)])
        self._length = np.concatenate([none, *lengths])
        digests = np.concatenate([_digests([]), *(found for _, _, found in opened)])
        self._order = digests.argsort()
        self._digests = digests[self._order]

    def _opened(self, path: Path) -> tuple[Any, np.ndarray, np.ndarray]:
        """Rows that are still on disk, lengths and hashes of a shard."""
        try:
            file = safe_open(path, framework="pt")
            packed, lengths, digests = file.get_slice("packed"), file.get_tensor("lengths"), file.get_tensor("digests")
            if packed.get_shape() != [int(lengths.sum()), self.channels] or digests.shape != (len(lengths), 16):
                raise ValueError(f"{packed.get_shape()} rows for {len(lengths)} texts")
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"EncodedTexts: folder: {path}: damaged file: {error}") from error
        return packed, lengths.numpy().astype(np.int64), digests.numpy().view("S16").reshape(-1)

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self._digests)

    def _rows(self, texts: list[str]) -> np.ndarray:
        """The row of each text in the tables, -1 for one that is not there."""
        digests = _digests(texts)
        places = np.searchsorted(self._digests, digests)
        rows = np.full(len(texts), -1)
        inside = places < len(self)
        same = inside.copy()
        same[inside] = self._digests[places[inside]] == digests[inside]
        rows[same] = self._order[places[same]]
        return rows

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that are not there, each once."""
        texts = checked_texts("EncodedTexts", texts)
        rows = self._rows(texts)
        return list(dict.fromkeys(text for text, row in zip(texts, rows, strict=True) if row < 0))

    def check(self, texts: Sequence[str]) -> None:
        """Raise a ValueError that names texts which are not there."""
        missing = self.missing(texts)
        if missing:
            named = ", ".join(repr(text[:60]) for text in islice(missing, _NAMED))
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise ValueError(
                f"EncodedTexts: texts: expected texts that were encoded into {self.folder}, got {named}{more}; "
                "fastvar encode-text adds them"
            )

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        """Features of texts, float32 on the CPU: what the encoder said of them.

        Raises:
            ValueError: a text that was not encoded, something else than a list of texts.
        """
        texts = checked_texts("EncodedTexts", texts)
        self.check(texts)
        rows = self._rows(texts)
        lengths = tuple(self._length[rows].tolist())
        parts = [
            self._packed[shard][start : start + length]
            for shard, start, length in zip(
                self._shard[rows].tolist(), self._start[rows].tolist(), lengths, strict=True
            )
        ]
        return TextFeatures(torch.cat([torch.empty(0, self.channels), *(part.float() for part in parts)]), lengths)


def _digests(texts: Sequence[str]) -> np.ndarray:
    """(n,) hashes of 16 bytes."""
    return np.array([hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts], dtype="S16")
