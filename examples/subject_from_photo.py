"""Images with the subject of a photo: its prefix is computed once and shared by all of them."""

from pathlib import Path

import torch
import tyro
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from fastvar.models import VAR


def main(model: Path, photo: Path, label: int = 0, count: int = 4, output: Path = Path("subject.png")) -> None:
    var = VAR.from_pretrained(model).eval()  # one that was trained with a subject
    size = list(var.tokenizer.config.image_size)
    image = pil_to_tensor(Image.open(photo).convert("RGB")).float() / 127.5 - 1
    image = center_crop(resize(image, max(size), antialias=True), size)
    subject = var.pyramid(var.tokenizer.encode(image[None]))  # (1, L, C), of all `count` images
    var.generate(torch.full((count,), label), subject=subject, guidance=2.0, seed=0).picture().save(output)


if __name__ == "__main__":
    tyro.cli(main)
