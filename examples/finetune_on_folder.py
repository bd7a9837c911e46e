"""A saved VAR trained further on a folder of images with one subfolder per class, as many as the model has."""

from pathlib import Path

import tyro

from fastvar.data import ImageFolder
from fastvar.models import VAR
from fastvar.training import TrainConfig, VARTask, train


def main(model: Path, photos: Path, output: Path, steps: int = 1000, batch_size: int = 64) -> None:
    var = VAR.from_pretrained(model)
    images = ImageFolder(photos, size=var.tokenizer.config.image_size, flip=True)
    config = TrainConfig(steps=steps, batch_size=batch_size, learning_rate=1e-4)
    train(VARTask(var), images, config, output)  # goes on where it stopped; output/model has the averaged weights


if __name__ == "__main__":
    tyro.cli(main)
