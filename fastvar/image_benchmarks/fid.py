"""FID: how far the features of images are from those of real ones, by torch-fidelity's Inception."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from fastvar.data.folder import images_below
from fastvar.image_benchmarks.items import Item
from fastvar.image_benchmarks.scoring import Scores, score_files
from fastvar.installation import install_command
from fastvar.rl.rewards.models import weights_name

Statistics = dict[str, np.ndarray]  # "mu" (d,) and "sigma" (d, d), float64


class FID:
    """The Frechet distance of Inception's features, as the original code in TensorFlow computes it (torch-fidelity).

    There is no interval: FID is biased in the number of images, and resampling them adds to the bias. Figures of other
    numbers of images are not to be compared; with fewer images than features it is far too large.

    Args:
        items: the images, such as `folder_items` or `class_items`.
        reference: a folder of real images, or their statistics in a .npz with "mu" and "sigma".
        output: where the features of the reference are kept.
        weights: the file of Inception's weights; None for the public ones, which torch-fidelity fetches.
        features: the layer, "2048" as published, or "768", "192", "64".
        device: where images are scored.

    Raises:
        ImportError: torch-fidelity is not installed; names the extra.
        ValueError: no image, another reference.

    Source: TTUR (arXiv 1706.08500).
    """

    name = "fid"
    per_prompt = 1

    def __init__(
        self,
        items: Sequence[Item],
        reference: Path,
        output: Path,
        *,
        weights: Path | None = None,
        features: str = "2048",
        device: str | torch.device = "cpu",
    ) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(f"torch-fidelity is needed: {install_command('fid')} ({error})") from error
        if len(items) < 2:
            raise ValueError(f"benchmark: images: expected at least 2 for FID, got {len(items)}")
        if weights is not None and not weights.is_file():
            raise ValueError(f"benchmark: weights: expected a file of Inception's weights, got {weights}")
        self.items, self.reference, self.device = items, reference, device
        self._kept, self._layer = output, features
        self._weights = "torch-fidelity's public weights" if weights is None else weights_name(weights)
        self._given = _read_statistics(reference) if reference.suffix == ".npz" else None
        self._real = [] if self._given is not None else folder_items(reference, "data")
        path = None if weights is None else str(weights)
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [features], feature_extractor_weights_path=path
        )

    def describe(self) -> dict[str, Any]:
        """Which network and weights."""
        return {
            "weights": f"inception-v3-compat, layer {self._layer}, {self._weights}",
            "preprocessing": "8 bits a channel, 299 x 299 bilinear as TensorFlow 1",
        }

    @torch.no_grad()
    def score(self, images: torch.Tensor, items: Sequence[Item]) -> Scores:
        """Features (n, d)."""
        network = self.network.to(images.device)
        return {"features": network((images * 255).round().to(torch.uint8))[0]}

    def summarise(self, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
        """FID, and of what; the reference is scored first, or taken from what was."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        real, figures = self._given, dict[str, Any](reference=str(self.reference))
        if real is None:
            files = [self.reference / item.text for item in self._real]
            kept = score_files(self, self._real, files, self._kept, device=self.device)
            real = _statistics(kept["features"])
            figures["reference_images"] = len(files)
        found = _statistics(scores["features"])
        if real["mu"].shape != found["mu"].shape:
            expected, got = len(found["mu"]), len(real["mu"])
            raise ValueError(f"benchmark: reference: expected statistics of {expected} features, got {got}")
        return {"fid": fid_statistics_to_metric(found, real, False)[KEY_METRIC_FID], "fid_95": None, **figures}


def folder_items(folder: Path, option: str = "images") -> list[Item]:
    """The images of a folder and those in it; an item's text is the path of its file as seen from the folder.

    Args:
        folder: of the images.
        option: what gave it, as it opens messages.

    Raises:
        ValueError: no such folder, fewer than two images.
    """
    files = [file.relative_to(folder) for file in images_below(folder)] if folder.is_dir() else []
    if len(files) < 2:
        raise ValueError(f"benchmark: {option}: expected a folder of at least 2 images, got {len(files)} in {folder}")
    return [Item(str(file.with_suffix("")), "", str(file)) for file in files]


def class_items(classes: int, count: int) -> list[Item]:
    """`count` images of a model of classes, each class as often as the others: 000000.png and so on."""
    return [Item(f"{i:06d}", i % classes) for i in range(count)]


def _statistics(features: torch.Tensor) -> Statistics:
    rows = features.double().numpy()
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def _read_statistics(path: Path) -> Statistics:
    try:
        with np.load(path) as file:  # no pickles
            return {name: np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma")}
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise ValueError(f'benchmark: data: expected "mu" and "sigma" in {path}, got {error}') from error
