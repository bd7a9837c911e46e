"""Readers for the OCR reward that other packages bring."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvar.data import Reading
from fastvar.installation import install_command
from fastvar.pictures import check_images, to_uint8
from fastvar.rl.rewards.base import Description
from fastvar.rl.rewards.models import memory_of


class WordReading(Reading):
    """A reading of any number of words: text joins them by spaces; boxes, confidences: (words, ...), of whole words;
    word_confidence: the least of them, 0 without any."""

    @property
    def words(self) -> list[str]:
        return self.text.split()

    @property
    def word_boxes(self) -> Tensor:
        return self.boxes

    @property
    def word_confidences(self) -> list[float]:
        return self.confidences.tolist()


class EasyOCRReader:
    """Reads images with EasyOCR, in its order. Words of one line share the line's box and confidence.

    Args:
        languages: EasyOCR's codes.
        gpu: whether or on which device to read; by default on a GPU if there is one.
        download: let EasyOCR fetch the weights that it has not got.
        options: more for `easyocr.Reader`, such as `model_storage_directory`.

    Raises:
        ImportError: easyocr is not installed; says how.
        FileNotFoundError: weights are missing and `download` is not set (by EasyOCR).
    """

    def __init__(
        self,
        languages: Sequence[str] = ("en",),
        *,
        gpu: bool | str | None = None,
        download: bool = False,
        **options: Any,
    ) -> None:
        try:
            import easyocr
        except ImportError as error:
            remedy = f"pip install easyocr, or {install_command('ocr')}"
            raise ImportError(f"easyocr is needed: {remedy} ({error})") from error
        gpu = torch.cuda.is_available() if gpu is None else gpu
        self._reader = easyocr.Reader(
            list(languages), gpu=gpu, download_enabled=download, **({"verbose": False} | options)
        )
        told = "".join(f", {name}={value}" for name, value in options.items())
        self._weights = f"EasyOCR's for {', '.join(languages)}{told}"

    @property
    def description(self) -> Description:
        """Which weights, and how much memory they take."""
        parts = [getattr(self._reader, name, None) for name in ("detector", "recognizer")]
        networks = [part for part in parts if isinstance(part, nn.Module)]
        return Description(self._weights, "EasyOCR's own", memory=memory_of(*networks))

    def __call__(self, images: Tensor) -> list[WordReading]:
        """Read images (B, 3, H, W) in [0, 1]. Boxes are x0, y0, x1, y1 in pixels, inside the image.

        Raises:
            ValueError: images of another shape or range.
        """
        check_images(images, "EasyOCRReader: images")
        # EasyOCR takes arrays as OpenCV has them: blue first, one piece of memory.
        return [_reading(self._reader.readtext(image[..., ::-1].copy()), image) for image in to_uint8(images)]


class RapidOCRReader:
    """Reads images with RapidOCR: PP-OCR's networks in ONNX, those in its package unless told otherwise. In its order;
    words of one line share the line's box and confidence.

    Args:
        params: by name what its configuration has, such as {"Global.text_score": 0.3} or
            {"EngineConfig.onnxruntime.use_cuda": true}.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed; says how.
        ValueError: a name that its configuration has not got (by RapidOCR).
    """

    def __init__(self, params: Mapping[str, Any] | None = None) -> None:
        given = dict(params or {})
        try:
            from rapidocr import RapidOCR

            self._reader = RapidOCR(params={"Global.log_level": "error", **given})
        except ImportError as error:  # rapidocr's, or onnxruntime's, which it asks for when it is made
            remedy = f"pip install rapidocr onnxruntime, or {install_command('rapidocr')}"
            raise ImportError(f"rapidocr is needed: {remedy} ({error})") from error
        told = "".join(f", {name}={value}" for name, value in given.items())
        self._weights = f"RapidOCR's{told}"

    @property
    def description(self) -> Description:
        """Which weights; what memory they take is not told by RapidOCR."""
        return Description(self._weights, "RapidOCR's own")

    def __call__(self, images: Tensor) -> list[WordReading]:
        """As `EasyOCRReader`."""
        check_images(images, "RapidOCRReader: images")
        readings = []
        for image in to_uint8(images):  # as OpenCV has them: blue first
            found = self._reader(image[..., ::-1].copy())
            lines = [] if found.txts is None else zip(found.boxes, found.txts, found.scores, strict=True)
            readings.append(_reading(lines, image))
        return readings


def _reading(lines: Iterable[tuple[Any, str, float]], image: Any) -> WordReading:
    """The reading of lines, each with its polygon, text and confidence, in an image (H, W, 3)."""
    words: list[str] = []
    boxes: list[list[float]] = []
    confidences: list[float] = []
    height, width = image.shape[:2]
    for polygon, text, confidence in lines:
        across = [min(max(float(x), 0.0), float(width)) for x, _ in polygon]
        down = [min(max(float(y), 0.0), float(height)) for _, y in polygon]
        for word in text.split():
            words.append(word)
            boxes.append([min(across), min(down), max(across), max(down)])
            confidences.append(float(confidence))
    return WordReading(
        " ".join(words),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(confidences, dtype=torch.float32),
        min(confidences, default=0.0),
    )
