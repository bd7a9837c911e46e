"""Prompts that ask for written texts: made of words and templates, or read from the files of published sets."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastvar.data.regions import quotas
from fastvar.files import read_json_object, read_text
from fastvar.random import derive

_OWNER = "prompt_file"
_DOUBLE = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')  # straight or curly
_SINGLE = re.compile(r"(?<!\w)'(.+?)'(?!\w)|\u2018(.+?)\u2019(?!\w)")  # an apostrophe has a letter on its left

TEMPLATES = (
    "A wooden sign beside a forest path that says {}.",
    "A shop window with {} painted on the glass.",
    "The cover of a paperback, titled {}.",
    "A chalkboard in a small café that reads {}.",
    "A poster on a brick wall with the words {}.",
    "A birthday cake with {} written in icing.",
    "A neon sign over a door at night, showing {}.",
    "A road sign in the desert that reads {}.",
    "A postcard of a harbour with {} printed across the sky.",
    "A label on a glass jar that says {}.",
)


class TextPrompt(NamedTuple):
    """A prompt that asks for written texts.

    Attributes:
        prompt: all of it, what a model reads.
        texts: that the image should show, one for each region; none where the prompt does not say.
        regions: how many regions of text there are to be; as a set has it, else the number of texts.
        name: in its set, such as "CVTG/2/17".
    """

    prompt: str
    texts: tuple[str, ...]
    regions: int
    name: str


def quoted_texts(prompt: str) -> tuple[str, ...]:
    """The texts between double quotes, straight or curly; in a prompt without any, those between single quotes."""
    for quotes in (_DOUBLE, _SINGLE):
        if found := [first or second for first, second in quotes.findall(prompt)]:
            return tuple(text.strip() for text in found)
    return ()


def words_to_show(prompt: str) -> list[str]:
    """The words that an image of a prompt should show: those of its texts in quotes, or all where nothing is quoted."""
    return " ".join(quoted_texts(prompt) or (prompt,)).split()


def make_prompts(
    words: Sequence[str],
    count: int,
    *,
    templates: Sequence[str] = TEMPLATES,
    shares: Mapping[int, float] | None = None,
    longest: int = 2,
    seed: int = 0,
) -> list[TextPrompt]:
    """Prompts of templates and words, all drawn at random.

    Args:
        words: to choose from; those of a prompt differ.
        count: how many prompts.
        templates: with "{}", which becomes the texts in double quotes: "A", "B" and "C".
        shares: of the prompts that have so many texts, {1: 1.0} by default; the counts are as near as they can be.
        longest: the most words of a text; each number from 1 on is as likely.
        seed: decides all.

    Raises:
        ValueError: no words, not enough for the longest prompt, or one with a quote; a template without "{}".
    """
    shares = {1: 1.0} if shares is None else shares
    words = list(dict.fromkeys(words))
    bad = [word for word in words if word.split() != [word] or quoted_texts(f'"{word}"') != (word,)]
    most = max(shares) * longest
    if bad or len(words) < most:
        expected = f"at least {most} different words without spaces and quotes"
        raise ValueError(f"make_prompts: words: expected {expected}, got {bad[:3] or len(words)}")
    for template in templates:
        if template.count("{}") != 1 or quoted_texts(template):
            raise ValueError(f"make_prompts: templates: expected '{{}}' once in each and no quotes, got {template!r}")
    draw = random.Random(derive(seed, "prompts"))
    regions = [number for number, size in quotas(shares, count).items() for _ in range(size)]
    draw.shuffle(regions)
    prompts = []
    for place, number in enumerate(regions):
        lengths = [draw.randint(1, longest) for _ in range(number)]
        chosen = iter(draw.sample(words, sum(lengths)))
        texts = tuple(" ".join(next(chosen) for _ in range(length)) for length in lengths)
        prompts.append(TextPrompt(draw.choice(templates).replace("{}", _listed(texts)), texts, number, str(place)))
    return prompts


def read_prompts(source: Path) -> list[TextPrompt]:
    """The prompts of a folder (`read_cvtg`), of a .json (`read_lex_bench`) or of any other file (`read_lines`)."""
    if source.is_dir():
        return read_cvtg(source)
    return read_lex_bench(source) if source.suffix == ".json" else read_lines(source)


def read_lines(path: Path) -> list[TextPrompt]:
    """A text file, a prompt on each line, as the OCR prompts of flow_grpo are: there each line has one text in double
    quotes. Empty lines are left out.

    Raises:
        ValueError, OSError: no text in UTF-8, or no prompt in it.
    """
    lines = read_text(path, _OWNER).split("\n")  # not splitlines: a text may have U+2028
    return _some(path, [_prompt(line.strip(), str(number)) for number, line in enumerate(lines, 1) if line.strip()])


def read_lex_bench(path: Path, *, field: str = "caption") -> list[TextPrompt]:
    """A file of LeX-Bench (arXiv 2503.21749), such as lex_bench_easy.json: a list of objects with "caption", short,
    "enhanced_caption", long, and "text", the texts to be shown.

    Args:
        path: the file.
        field: which of the captions is the prompt. Long ones do not always quote the texts as they are to be.

    Raises:
        ValueError, OSError: another file.
    """
    try:
        entries = json.loads(read_text(path, _OWNER))
        prompts = [
            _prompt(_text(entry[field]), str(entry.get("prompt_idx", number)), texts=entry.get("text"))
            for number, entry in enumerate(entries)
        ]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        expected = f'a list of objects with texts under "{field}", as LeX-Bench has'
        raise ValueError(f"{_OWNER}: expected {expected}, got {path} ({error})") from error
    return _some(path, prompts)


def read_cvtg(folder: Path, owner: str = _OWNER) -> list[TextPrompt]:
    """CVTG-2K (arXiv 2503.23461) as its archive unpacks: folders CVTG and CVTG-Style with files 2.json to 5.json, whose
    name is the number of regions. Each has a list "data_list" of objects with "index" and "prompt"; where there is only
    N_combined.json, an object of prompts by index, that is read. Texts stand in single quotes.

    In the order of folders, numbers and indices.

    Args:
        folder: of the archive.
        owner: the option that it was given by, as it opens messages.

    Raises:
        ValueError, OSError: another folder; names the file.
    """
    prompts = []
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    for part in (place for place in places if place.name.lower() in ("cvtg", "cvtg-style")):
        for regions in range(1, 6):
            path = part / f"{regions}.json"
            path = path if path.is_file() else part / f"{regions}_combined.json"
            if not path.is_file():
                continue
            content = read_json_object(path, owner)
            try:
                entries = content.get("data_list", [{"index": key, "prompt": content[key]} for key in content])
                for entry in sorted(entries, key=lambda entry: int(entry["index"])):
                    name = f"{part.name}/{regions}/{int(entry['index'])}"
                    prompts.append(_prompt(_text(entry["prompt"]), name, regions=regions))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                expected = "prompts by index, as CVTG-2K has"
                raise ValueError(f"{owner}: expected {expected}, got {path} ({error})") from error
    return _some(folder, prompts, "the folders CVTG and CVTG-Style with 2.json to 5.json in", owner)


def _prompt(prompt: str, name: str, *, texts: Sequence[str] | None = None, regions: int | None = None) -> TextPrompt:
    shown = quoted_texts(prompt) if texts is None else tuple(_text(text) for text in texts)
    return TextPrompt(prompt, shown, len(shown) if regions is None else regions, name)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value.strip()


def _some(
    source: Path, prompts: list[TextPrompt], what: str = "at least one in", owner: str = _OWNER
) -> list[TextPrompt]:
    if not prompts:
        raise ValueError(f"{owner}: expected prompts, {what} {source}, got none")
    return prompts


def _listed(texts: Sequence[str]) -> str:
    quoted = [f'"{text}"' for text in texts]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
