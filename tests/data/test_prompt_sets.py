"""Prompts of texts: what is quoted, what is made, and the files of published sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fastvar.data import make_prompts, read_prompts
from fastvar.data.prompt_sets import TEMPLATES, quoted_texts, read_lex_bench, words_to_show
from fastvar.data.regions import quotas

WORDS = [f"word{i}" for i in range(40)]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('A mug labeled "Campfire Brew" on a log.', ("Campfire Brew",)),
        ('A tent with "World\'s Smallest Elephant" and "Don\'t Touch".', ("World's Smallest Elephant", "Don't Touch")),
        ("On the sailor's ship 'Don't Panic', and 'Ahoy'!", ("Don't Panic", "Ahoy")),
        ("A sign \u201cOpen\u201d, a \u2018shop\u2019s door\u2019.", ("Open",)),
        ("A \u2018quiet\u2019 street", ("quiet",)),
        ("The dog's bone isn't there", ()),
        ("42", ()),
    ],
)
def test_quoted_texts(prompt: str, texts: tuple[str, ...]) -> None:
    assert quoted_texts(prompt) == texts
    assert words_to_show(prompt) == " ".join(texts or (prompt,)).split()


def test_made_prompts() -> None:
    """Exact shares of the numbers of texts, all quoted as they are to be shown; the same for the same seed alone."""
    shares = {2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}
    prompts = make_prompts(WORDS, 50, shares=shares, seed=3)
    assert Counter(item.regions for item in prompts) == {2: 10, 3: 15, 4: 15, 5: 10}
    for item in prompts:
        assert quoted_texts(item.prompt) == item.texts and len(item.texts) == item.regions
        words = words_to_show(item.prompt)
        assert set(words) <= set(WORDS) and len(set(words)) == len(words) <= 2 * item.regions
    assert prompts == make_prompts(WORDS, 50, shares=shares, seed=3) != make_prompts(WORDS, 50, shares=shares, seed=4)
    assert {len(item.texts[0].split()) for item in make_prompts(WORDS, 30)} == {1, 2}
    assert len({item.prompt.replace(f'"{item.texts[0]}"', "{}") for item in make_prompts(WORDS, 99)}) == len(TEMPLATES)
    with pytest.raises(ValueError, match=r"words: expected at least 10 different words .* got 3"):
        make_prompts(["a", "b", "c"], 4, shares=shares)
    with pytest.raises(ValueError, match=r"words: expected .* got \['two words'\]"):
        make_prompts([*WORDS, "two words"], 4)
    with pytest.raises(ValueError, match=r"templates: expected '\{\}' once"):
        make_prompts(WORDS, 4, templates=["nothing"])


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text('A board that reads "Try Our New Burger".\n\n  A "Lens" \u2028 and "Cap"  \n', encoding="utf-8-sig")
    first, second = read_prompts(path)
    assert first == ('A board that reads "Try Our New Burger".', ("Try Our New Burger",), 1, "1")
    assert second[1:] == (("Lens", "Cap"), 2, "3")
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"prompt_file: expected prompts, at least one in .*train\.txt, got none"):
        read_prompts(path)


def test_lex_bench(tmp_path: Path) -> None:
    path = tmp_path / "lex_bench_easy.json"
    entry = {"text": ["AREA", "PEOPLE"], "color": ["cyan"], "prompt_idx": "0001", "text_count": 2}
    entry |= {
        "caption": 'A logo, with "AREA" in cyan, "PEOPLE" in purple.',
        "enhanced_caption": "Long, with \u201carea",
    }
    path.write_text(json.dumps([entry, {"caption": 'A "B"'}]))
    first, second = read_prompts(path)
    assert first == (entry["caption"], ("AREA", "PEOPLE"), 2, "0001") and second == ('A "B"', ("B",), 1, "1")
    path.write_text(json.dumps([entry]))
    assert read_lex_bench(path, field="enhanced_caption")[0].prompt == entry["enhanced_caption"]
    for content in ("{}", "[3]", '[{"caption": 3}]', "[", "[[]]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"prompt_file: expected .*lex_bench_easy\.json"):
            read_prompts(path)


def test_cvtg(tmp_path: Path) -> None:
    """By folder, number and index, whatever the order in the files; a combined file where there is no other."""
    for name in ("CVTG", "CVTG-Style"):
        (tmp_path / name).mkdir()
    entries = [{"index": i, "prompt": f"A café with 'Fresh {i}' on a mug and 'Tea' above"} for i in (10, 9)]
    (tmp_path / "CVTG/2.json").write_text(json.dumps({"data_list": entries}))
    (tmp_path / "CVTG/2_combined.json").write_text(json.dumps({"0": "other"}))
    (tmp_path / "CVTG-Style/5_combined.json").write_text(json.dumps({"1": "b 'c'", "0": "a"}))
    found = read_prompts(tmp_path)
    assert [item.name for item in found] == ["CVTG/2/9", "CVTG/2/10", "CVTG-Style/5/0", "CVTG-Style/5/1"]
    assert found[0].texts == ("Fresh 9", "Tea") and [item.regions for item in found] == [2, 2, 5, 5]
    (tmp_path / "CVTG/3.json").write_text('{"data_list": [{"index": "x", "prompt": "a"}]}')
    with pytest.raises(ValueError, match=r"expected prompts by index, as CVTG-2K has, got .*CVTG/3\.json"):
        read_prompts(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folders CVTG and CVTG-Style with 2\.json to 5\.json in"):
        read_prompts(tmp_path / "empty")


def test_quotas_are_whole_and_nearest() -> None:
    assert quotas({2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}, 10) == {2: 2, 3: 3, 4: 3, 5: 2}
    assert quotas({1: 1, 2: 1, 3: 1}, 5) == {1: 2, 2: 2, 3: 1}
    assert quotas({4: 2, 2: 6}, 0) == {2: 0, 4: 0}
    for bad in ({}, {1: -1.0}, {1: float("nan")}, {1: 0.0}):
        with pytest.raises(ValueError, match="quotas: shares: expected numbers from 0 on"):
            quotas(bad, 3)
