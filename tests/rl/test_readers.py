"""Readers that other packages bring, with a stand-in for the package."""

from __future__ import annotations

import sys
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastvar import handwriting
from fastvar.builtin import READERS
from fastvar.rl.rewards import EasyOCRReader, OCRReward, RapidOCRReader, create

IMAGES = torch.zeros(3, 3, 20, 40)
IMAGES[:, 0] = 1.0  # red
IMAGES[1, 2] = 0.5
IMAGES[2] = 1.0


class FakeReader:
    """Answers as `easyocr.Reader.readtext` does, by the blue of the first pixel; numbers are numpy's there too."""

    made: tuple[list[str], dict[str, Any]]

    def __init__(self, languages: list[str], **options: Any) -> None:
        type(self).made = (languages, options)

    def readtext(self, image: np.ndarray) -> list[tuple[Any, str, Any]]:
        assert image.dtype == np.uint8 and image.shape == (20, 40, 3) and image.flags["C_CONTIGUOUS"]
        blue, _, red = image[0, 0].tolist()
        assert red == 255
        slanted = [[2.5, -1.0], [12.0, 3], [11.0, 9.0], [1.5, 7]]
        level = [[np.int32(20), np.int32(5)], [np.int32(50), np.int32(5)], [np.int32(50), np.int32(15)], [20, 15]]
        return {
            0: [(slanted, "Hello", np.float64(0.75)), (level, "big world", 0.5)],
            128: [],
            255: [(level, " ", 0.9)],
        }[blue]


class Quantised(torch.nn.Module):
    """Has in its state dict what a dynamically quantised layer has there."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}dtype"] = torch.qint8
        destination[f"{prefix}packed"] = (torch.zeros(1), None)


@pytest.fixture(autouse=True)
def easyocr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyocr", SimpleNamespace(Reader=FakeReader))


def test_readings() -> None:
    lines, nothing, blank = EasyOCRReader(gpu=False)(IMAGES)
    assert lines.text == "Hello big world" and lines.words == ["Hello", "big", "world"]
    assert lines.boxes.tolist() == [[1.5, 0, 12, 9], [20, 5, 40, 15], [20, 5, 40, 15]]  # inside 40 x 20
    assert torch.equal(lines.word_boxes, lines.boxes)
    assert lines.word_confidences == lines.confidences.tolist() == [0.75, 0.5, 0.5] and lines.word_confidence == 0.5
    for empty in (nothing, blank):
        assert empty.words == [] and empty.word_confidences == [] and empty.word_confidence == 0
        assert empty.boxes.shape == (0, 4)
    with pytest.raises(ValueError, match=r"EasyOCRReader: images: expected values in \[0, 1\]"):
        EasyOCRReader(gpu=False)(IMAGES * 255)


def test_options_and_no_download() -> None:
    EasyOCRReader()
    assert FakeReader.made == (["en"], {"gpu": torch.cuda.is_available(), "download_enabled": False, "verbose": False})
    create("ocr", reader="easyocr", languages=("de", "en"), gpu="cuda:1", download=True, model_storage_directory="m")
    options = {"gpu": "cuda:1", "download_enabled": True, "verbose": False, "model_storage_directory": "m"}
    assert FakeReader.made == (["de", "en"], options)


def test_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU EasyOCR quantises layers, whose state dict has more than tensors; an error is not taken for silence."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    network.add_module("quantised", Quantised())
    monkeypatch.setattr(FakeReader, "recognizer", network, raising=False)
    reward: Any = create("ocr", reader="easyocr", languages=["de", "en"], recog_network="latin_g2")
    assert reward.description.weights == "EasyOCR's for de, en, recog_network=latin_g2"
    assert reward.description.memory == 4 * (6 + 2 + 4 * 2) + 8 and reward.description.range.startswith("-0.6 to 2")
    monkeypatch.setattr(EasyOCRReader, "description", property(lambda reader: reader.missing))
    with pytest.raises(AttributeError, match="missing"):
        _ = reward.description


def test_reward() -> None:
    reward: Any = create("ocr", reader="easyocr")
    scores, mask = reward(IMAGES, ["hello big world", "hello", "hello"])
    mean = (0.75 + 0.5 + 0.5) / 3
    assert scores.tolist() == pytest.approx([2 * mean, -0.6, -0.6])
    assert mask[0, 0, 1] and mask[0, 10, 39] and not mask[0, 0, 13] and mask[1:].all()


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: resolve_name(path) for name, path in READERS.items()} == {
        "easyocr": EasyOCRReader,
        "handwriting": handwriting.Reader,
        "rapidocr": RapidOCRReader,
    }
    monkeypatch.setattr(handwriting, "Reader", lambda: list)  # the real one takes seconds
    assert OCRReward().reader(IMAGES[:0]) == []
    with pytest.raises(
        ValueError, match=r"OCRReward: reader: expected one of \('easyocr', 'handwriting', 'rapidocr'\), got 'eyes'"
    ):
        create("ocr", reader="eyes")
    with pytest.raises(ValueError, match=r"OCRReward: options: expected none beside a reader, got \['gpu'\]"):
        OCRReward(EasyOCRReader(), gpu=True)
    monkeypatch.setitem(sys.modules, "easyocr", None)
    with pytest.raises(ImportError, match="easyocr is needed: pip install easyocr"):
        create("ocr", reader="easyocr")


class FakeRapidOCR:
    """Answers as `rapidocr.RapidOCR` does, whose outputs have None in place of no lines."""

    params: dict[str, Any]

    def __init__(self, config_path: str | None = None, params: dict[str, Any] | None = None) -> None:
        type(self).params = params or {}

    def __call__(self, image: np.ndarray) -> SimpleNamespace:
        lines = FakeReader([]).readtext(image)
        if not lines:
            return SimpleNamespace(boxes=None, txts=None, scores=None)
        polygons, texts, scores = zip(*lines, strict=True)
        return SimpleNamespace(boxes=np.array(polygons, np.float32), txts=texts, scores=scores)


def test_rapidocr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads as EasyOCR does where both packages find the same."""
    monkeypatch.setitem(sys.modules, "rapidocr", SimpleNamespace(RapidOCR=FakeRapidOCR))
    reward: Any = create("ocr", reader="rapidocr", params={"Global.text_score": 0.3})
    assert FakeRapidOCR.params == {"Global.log_level": "error", "Global.text_score": 0.3}
    assert reward.description.weights == "RapidOCR's, Global.text_score=0.3"
    for reading, other in zip(reward.reader(IMAGES), EasyOCRReader(gpu=False)(IMAGES), strict=True):
        assert reading.words == other.words and reading.word_confidences == other.word_confidences
        assert torch.equal(reading.boxes, other.boxes)
    with pytest.raises(ValueError, match=r"RapidOCRReader: images: expected values in \[0, 1\]"):
        reward.reader(IMAGES * 255)
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match="rapidocr is needed: pip install rapidocr onnxruntime"):
        RapidOCRReader()
