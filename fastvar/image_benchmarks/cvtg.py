"""CVTG-2K: prompts with several texts to be shown, and how many of their words a reader finds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvar.data import Reader
from fastvar.data.metrics import edit_similarity
from fastvar.data.prompt_sets import read_cvtg
from fastvar.image_benchmarks.figures import mean_figure, ratio_figure, rows_by_group
from fastvar.image_benchmarks.items import Item, taken_prompts
from fastvar.image_benchmarks.scoring import Scores, describe_scorers
from fastvar.rl.rewards.clip import CLIPTextReward

_QUOTED = re.compile(r"'(.*?)'")


class WordCounts(NamedTuple):
    """What was read of the words that should be there.

    Attributes:
        words: how many there should be.
        right: how many of them were read, each reading counting once.
        present: how many of them are among the words that were read; one reading counts for all that are equal.
        similarity: the sum over them of 1 - edit distance / longer length to the closest word that was read.
    """

    words: int
    right: int
    present: int
    similarity: float


def count_words(truth: Sequence[str], read: Sequence[str]) -> WordCounts:
    """Compare words in lower case, whatever their order. The closest reading is difflib's, as published: it need not be
    the one with the least edit distance."""
    goal, found = ([word.lower() for word in words] for words in (truth, read))
    right = (Counter(goal) & Counter(found)).total()
    present = sum(word in found for word in goal)
    closest = [get_close_matches(word, found, n=1, cutoff=0) for word in goal]
    similarity = sum(edit_similarity(word, *other) for word, other in zip(goal, closest, strict=True) if other)
    return WordCounts(len(goal), right, present, similarity)


class CVTG2K:
    """Word accuracy, NED and CLIPScore, all in all, by the number of regions and by set.

    The words of an image are those between single quotes in its prompt. Word accuracy is the share of all words of all
    images that were read, as multisets; as published, where one reading counts for all equal words, it is
    "word_accuracy_published". NED is the mean over all words of the similarity to the closest reading; CLIPScore the
    mean over images. Intervals are over images.

    An image is SET/REGIONS/INDEX.png, as CVTG/2/0.png: the layout of the published evaluation.

    Args:
        data: the unpacked folder, with CVTG and CVTG-Style, in each 2.json to 5.json.
        reader: what reads the images; published figures are PaddleOCR's.
        clip_score: a `CLIPTextReward` with `clip_score`; published figures are those of OpenAI's ViT-L/14 on
            its default template, "A photo depicts {}".
        take: score so many prompts, see `taken_prompts`; 0 for all.

    Raises:
        ValueError: another folder, a prompt without quoted words.

    Source: TextCrafter (arXiv 2503.23461).
    """

    name = "cvtg-2k"
    per_prompt = 1

    def __init__(self, data: Path, reader: Reader, clip_score: CLIPTextReward, *, take: int = 0) -> None:
        self.reader, self.clip_score = reader, clip_score
        self.items: Sequence[Item] = taken_prompts(items_of(data), 1, take)

    def describe(self) -> dict[str, Any]:
        """Which reader and which weights."""
        return describe_scorers({"reader": self.reader, "clip_score": self.clip_score})

    def score(self, images: torch.Tensor, items: Sequence[Item]) -> Scores:
        """Of each image the counts of its words, what was read, and CLIPScore."""
        readings = [reading.words for reading in self.reader(images)]
        counts = [count_words(words_of(item.text), words) for item, words in zip(items, readings, strict=True)]
        columns = torch.tensor(counts, dtype=torch.float64)
        return {
            **dict(zip(WordCounts._fields, columns.unbind(1), strict=True)),
            "clip_score": self.clip_score(images, [item.text for item in items]).scores,
            "read": [" ".join(words) for words in readings],
        }

    def summarise(self, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
        """The figures of all, of each number of regions and of each set."""

        def of(rows: list[int]) -> dict[str, Any]:
            taken = {name: scores[name][rows].double() for name in (*WordCounts._fields, "clip_score")}
            return {
                "images": len(rows),
                **ratio_figure("word_accuracy", taken["right"], taken["words"]),
                **ratio_figure("word_accuracy_published", taken["present"], taken["words"]),
                **ratio_figure("ned", taken["similarity"], taken["words"]),
                **mean_figure("clip_score", taken["clip_score"]),
            }

        sets = rows_by_group([item._replace(group=item.name.partition("/")[0]) for item in items])
        return {
            **of(list(range(len(items)))),
            "regions": {group: of(rows) for group, rows in rows_by_group(items).items()},
            "sets": {group: of(rows) for group, rows in sets.items()},
        }


def words_of(prompt: str) -> list[str]:
    """The words between single quotes, as the published evaluation takes them: an apostrophe is a quote too."""
    return [word for text in _QUOTED.findall(prompt) for word in text.split()]


def items_of(data: Path) -> list[Item]:
    """All images of CVTG-2K, by set, number of regions and index; errors as there."""
    prompts = read_cvtg(data, "benchmark: data")
    for prompt in prompts:
        if not words_of(prompt.prompt):
            raise ValueError(
                f"benchmark: data: expected words in single quotes, got {prompt.prompt!r} of {prompt.name} in {data}"
            )
    return [Item(each.name, each.prompt, each.prompt, str(each.regions)) for each in prompts]
