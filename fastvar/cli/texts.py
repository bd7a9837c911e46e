"""The command that computes text features once, so that training needs no text encoder in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastvar.cli.common import chosen_device, load_encoder
from fastvar.cli.outputs import output_folder
from fastvar.files import read_text
from fastvar.ranges import Count, OneOf


@dataclass(frozen=True)
class EncodeText:
    """Compute features of texts and keep them in a folder; called again, it goes on and adds what is new."""

    text_encoder: str
    """A T5, by a folder or its name on the Hugging Face hub (google/flan-t5-xl for Infinity's public models), or
    "characters", or "characters-C" for C channels. By this name, a folder's absolute path, `max_length` and `precision`
    features are known; not by weights."""
    output: Path
    """Folder of the features, a file a shard."""
    texts: Path | None = None
    """A text file, a text on each line; empty lines are left out, and white space around a text."""
    data: str | None = None
    """Or images with texts, as `fastvar train --task infinity` takes them: a folder, a .jsonl, tars."""
    skip_bad: bool = False
    """Leave out images without a text, with a warning, instead of stopping."""
    max_length: Count = 512
    """Most rows of a text; what is longer loses its end."""
    precision: Annotated[str, OneOf("float32", "bfloat16")] = "bfloat16"
    """Dtype of a T5's weights and features: "float32" or "bfloat16"."""
    batch_size: Count = 32
    """Texts encoded at a time."""
    shard_size: Count = 4096
    """Texts of a file."""
    device: str | None = None
    """"cpu", "cuda" or one GPU such as "cuda:1"; by default the GPU, if there is one."""

    def run(self) -> None:
        import torch

        from fastvar.data.text_images import find_text_images
        from fastvar.models import encode_texts
        from fastvar.training.lock import locked

        if (self.texts is None) == (self.data is None):
            raise ValueError("encode-text: texts, data: expected exactly one of them")
        output_folder("output", self.output)
        device = chosen_device(self.device)
        if self.texts is not None:
            lines = read_text(self.texts, "texts").split("\n")  # not splitlines: a text may have U+2028
            texts = [text for line in lines if (text := line.strip())]
        else:
            assert self.data is not None
            texts = [item.text for item in find_text_images(self.data, skip_bad=self.skip_bad)]
        dtype = getattr(torch, self.precision)
        encoder = load_encoder(self.text_encoder, max_length=self.max_length, dtype=dtype, device=device)
        with locked(self.output):
            count = encode_texts(encoder, texts, self.output, batch_size=self.batch_size, shard_size=self.shard_size)
        print(f"{self.output}: {count} texts encoded, {len(set(texts)) - count} were there")
