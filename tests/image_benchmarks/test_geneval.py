"""GenEval: checks on given objects by hand, colours, figures; what Mask2Former's logits say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.data.metrics import mean_interval
from fastvar.image_benchmarks import Found, GenEval, Mask2Former, run_benchmark
from fastvar.image_benchmarks.geneval import COLOURS, fault, items_of, relations
from fastvar.rl.rewards import CLIPTextReward
from tests.helpers.pictures import save_images, smooth_images

CUP = {"class": "cup", "count": 1}
DOG = {"class": "dog", "count": 1}


def at(left: float, top: float, side: float = 10, score: float = 1.0) -> Found:
    return Found((left, top, left + side, top + side), score)


def no_colours(label: str, found: Any) -> list[str]:
    raise AssertionError("no colour is asked for")


@pytest.mark.parametrize(
    ("box", "names"),
    [
        ((30, 0), {"left of"}),  # the centres differ by 30, of which 2 do not count: 28 / 30
        ((-30, 0), {"right of"}),
        ((0, 30), {"above"}),
        ((0, -30), {"below"}),
        ((30, 30), {"left of", "above"}),  # 28 / 42.4 = 0.66 each
        ((30, 14), {"left of"}),  # 12 / 33.1 = 0.36
        ((2, 2), set()),  # a tenth of both sides
        ((3, 0), set()),  # 1 / 3
        ((4.1, 0), {"left of"}),  # 2.1 / 4.1
        ((0, 0), set()),
    ],
)
def test_positions(box: tuple[float, float], names: set[str]) -> None:
    assert relations(at(0, 0), at(*box)) == names


@pytest.mark.parametrize(
    ("parts", "objects", "wrong"),
    [
        ({"include": [CUP]}, {"cup": [at(0, 0)]}, ""),
        ({"include": [CUP]}, {"dog": [at(0, 0)]}, "expected 1 cup, found 0"),
        ({"include": [CUP, DOG]}, {"cup": [at(0, 0)]}, "expected 1 dog, found 0"),
        ({"include": [CUP, DOG]}, {"cup": [at(0, 0)], "dog": [at(0, 0)] * 3}, ""),
        (
            {"include": [{**CUP, "count": 2}], "exclude": [{**CUP, "count": 3}]},
            {"cup": [at(0, 0)] * 3},
            "expected fewer than 3 cup",
        ),
        ({"include": [{**CUP, "count": 2}], "exclude": [{**CUP, "count": 3}]}, {"cup": [at(0, 0)] * 2}, ""),
        # the surest dog counts alone
        (
            {"include": [CUP, {**DOG, "position": ["below", 0]}]},
            {"cup": [at(0, 0)], "dog": [at(0, 40), at(0, -40)]},
            "",
        ),
        (
            {"include": [CUP, {**DOG, "position": ["below", 0]}]},
            {"cup": [at(0, 0)], "dog": [at(0, -40), at(0, 40)]},
            "expected dog below",
        ),
        (
            {"include": [CUP, {**DOG, "position": ["below", 0]}]},
            {"dog": [at(0, 40)]},
            "expected 1 cup, found 0; nothing for dog to be below",
        ),
    ],
)
def test_checks(parts: dict[str, Any], objects: Any, wrong: str) -> None:
    assert fault(parts, objects, no_colours) == wrong


def test_colours_of_the_surest() -> None:
    asked = []

    def colours(label: str, found: Any) -> list[str]:
        asked.append((label, list(found)))
        return ["red", "blue"][: len(found)]

    cups = [at(0, 0), at(5, 0), at(9, 0)]
    for count, colour, wrong in ((1, "red", ""), (2, "red", "expected red cup, found red, blue")):
        assert fault({"include": [{"class": "cup", "count": count, "color": colour}]}, {"cup": cups}, colours) == wrong
    assert asked == [("cup", cups[:1]), ("cup", cups[:2])]


def test_what_clip_sees(tiny_clip: str) -> None:
    """The object in its box, the rest of it grey, against the mean of unit features of three texts of each colour."""
    benchmark: Any = SimpleNamespace(clip=CLIPTextReward(pretrained=None, model=tiny_clip))
    network, image = benchmark.clip.clip, smooth_images(1, 40, 40)[0]
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[4:30, 6:20] = True
    crop = image[:, 4:30, 6:20].clone()
    mask[4:10, 6:12] = False
    crop[:, :6, :6] = 0x99 / 255
    shown, see = [], network.images
    network.images = lambda crops: (shown.append(crops), see(crops))[1]
    with torch.no_grad():
        seen, nearness = see(crop[None])[0], []
        for colour in COLOURS:
            ways = (f"a photo of a {colour} cup", f"a photo of a {colour}-colored cup", f"a photo of a {colour} object")
            mean = network.texts(ways, seen.device).mean(0)
            nearness.append(float(seen @ mean / mean.norm()))
    found = Found((6.2, 4.0, 19.8, 30.0), 1.0, mask)
    assert GenEval.colour(benchmark, image, "cup", found) == COLOURS[nearness.index(max(nearness))]
    assert torch.equal(shown[0], crop[None])


class Sees:
    """Finds in each image what it is told."""

    labels = ("cup", "dog")

    def __init__(self, found: list[Any]) -> None:
        self.found = iter(found)

    def __call__(self, images: torch.Tensor) -> list[Any]:
        return [next(self.found) for _ in images]


def test_figures_by_hand(tmp_path: Path, tiny_clip: str) -> None:
    """Objects count from 0.3, those to be counted from 0.9; intervals are over prompts, tasks weigh alike."""
    lines = [{"tag": "single_object", "prompt": "a cup", "include": [CUP]}] * 2
    lines += [{"tag": "counting", "prompt": "a dog", "include": [DOG], "exclude": [{**DOG, "count": 2}]}] * 2
    data = tmp_path / "metadata.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    seen = [0.31, 0.29, 0.5, 0.5, 0.91, 0.89, 0.95, 0.1]
    found = [{"cup" if i < 4 else "dog": [at(0, 0, score=score)]} for i, score in enumerate(seen)]
    clip = CLIPTextReward(pretrained=None, model=tiny_clip)
    benchmark = GenEval(data, Sees(found), clip, per_prompt=2)
    names = [item.name for item in benchmark.items]
    assert names[:3] == ["00000/samples/0000", "00000/samples/0001", "00001/samples/0000"]
    save_images(tmp_path / "images", names, smooth_images(8))
    figures = run_benchmark(benchmark, tmp_path / "images", tmp_path / "out")["figures"]
    one, counted = figures["tasks"]["single_object"], figures["tasks"]["counting"]
    assert (one["correct"], counted["correct"], figures["overall"]) == (0.75, 0.5, 0.625)
    assert one["correct_95"] == pytest.approx(mean_interval([0.5, 1.0])) and one["correct_prompts"] == 1.0
    assert counted["correct_95"] == pytest.approx([0.5, 0.5])  # one right of two images, twice
    half = (one["correct_95"][1] - one["correct_95"][0]) / 2 / 2
    assert figures["overall_95"] == pytest.approx([0.625 - half, min(0.625 + half, 1.0)])


def test_what_is_looked_at(tmp_path: Path, tiny_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours are those of the objects that were found, and as many as are asked for are counted."""
    lines = [{"tag": "colors", "prompt": "", "include": [{**CUP, "color": colour}]} for colour in ("red", "blue")]
    lines += [{"tag": "counting", "prompt": "", "include": [{**DOG, "count": 3}]}] * 2
    data = tmp_path / "metadata.jsonl"
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = [{"cup": [at(i, 0)]} for i in range(2)] + [{"dog": [at(0, 0)] * count} for count in (3, 2)]
    benchmark = GenEval(data, Sees(found), CLIPTextReward(pretrained=None, model=tiny_clip), per_prompt=1)
    asked, images = [], smooth_images(4)

    def colour(self: GenEval, image: torch.Tensor, label: str, found: Found) -> str:
        asked.append((label, found))
        assert torch.equal(image, images[len(asked) - 1])
        return "red"

    monkeypatch.setattr(GenEval, "colour", colour)
    scores = benchmark.score(images, benchmark.items)
    assert scores["correct"].tolist() == [1, 0, 1, 0] and asked == [("cup", at(0, 0)), ("cup", at(1, 0))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "got none in"),
        ("a cup", "got 'a cup' in"),
        ('{"prompt": "a cup", "tag": "counting"}', "expected lines of evaluation_metadata.jsonl, got"),
        (json.dumps({"prompt": "", "tag": "", "include": [{"class": "yak"}]}), r"finds, got \['yak'\]"),
    ],
)
def test_another_file(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_text(line)
    with pytest.raises(ValueError, match=message):
        items_of(tmp_path / "data", ["cup"])


def test_mask2former(mask2former: Path) -> None:
    """Objects of logits by hand; a network reads images of any size, and gives masks of theirs."""
    detector = Mask2Former(str(mask2former), sides=(64, 96))
    assert detector.labels == ["cup", "tv remote"]
    classes = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    masks = torch.full((2, 6, 8), -4.0)
    masks[0, 2:4, 1:5] = 2.0
    found = detector._objects(classes, masks)
    likely = classes[0].softmax(0) * torch.tensor(2.0).sigmoid()
    for label, name in enumerate(detector.labels):  # a mask is every label's; the other mask is empty
        (one,) = found[name]
        assert one.box == (1, 2, 5, 4) and one.score == pytest.approx(float(likely[label]))
        assert one.mask is not None and int(one.mask.sum()) == 8
    shown: list[torch.Tensor] = []
    hook = detector.model.register_forward_pre_hook(
        lambda _, __, named: shown.append(named["pixel_values"]), with_kwargs=True
    )
    detector(torch.full((1, 3, 30, 70), 0.5))
    hook.remove()
    (pixels,) = shown  # 30 x 70 becomes 41 x 96, on 64 x 96
    expected = torch.zeros(1, 3, 64, 96)
    expected[:, :, :41] = torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(pixels, expected)
    for objects in detector(smooth_images(2, 30, 70)):
        assert objects["cup"][0].score > 0.5
        assert objects["cup"][0].mask is not None and objects["cup"][0].mask.shape == (30, 70)
        scores = [one.score for one in objects["cup"]]
        assert scores == sorted(scores, reverse=True)
    assert "Mask2Former" in detector.description.weights and detector.description.memory > 0
