"""The OCR reward with a reader of your own: a function from images to what stands in each of them.

Here Tesseract, through the package pytesseract; anything else that gives words and boxes will do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from fastvar.data import Reading
from fastvar.rl.rewards import OCRReward


class TesseractReader:
    """Reads the likeliest word of each image.

    Args:
        read: from a PIL image to lists of the words, their boxes and confidences, as pytesseract.image_to_data gives.
    """

    def __init__(self, read: Callable[[Any], dict[str, list[Any]]] | None = None) -> None:
        if read is None:
            import pytesseract

            def read(image: Any) -> dict[str, list[Any]]:
                return pytesseract.image_to_data(image, output_type=pytesseract.Output.DICT)

        self.read = read

    def __call__(self, images: torch.Tensor) -> list[Reading]:
        return [self._reading(self.read(to_pil_image(image))) for image in images.cpu()]

    @staticmethod
    def _reading(found: dict[str, list[Any]]) -> Reading:
        words = [i for i, text in enumerate(found["text"]) if text.strip()]
        if not words:
            return Reading("", torch.zeros(0, 4), torch.zeros(0), 0.0)
        best = max(words, key=lambda i: float(found["conf"][i]))
        left, top, width, height = (float(found[name][best]) for name in ("left", "top", "width", "height"))
        text, confidence = found["text"][best].strip(), float(found["conf"][best]) / 100
        edges = left + width * torch.linspace(0, 1, len(text) + 1)  # characters as if they were equally wide
        boxes = torch.stack([edges[:-1], torch.full_like(edges[:-1], top), edges[1:], edges[:-1] * 0 + top + height], 1)
        return Reading(text, boxes, torch.full((len(text),), confidence), confidence)


def main() -> None:
    reward = OCRReward(TesseractReader())
    white = torch.ones(1, 3, 64, 256)
    print(reward(white, ["fast"], None).scores)  # nothing to read


if __name__ == "__main__":
    main()
