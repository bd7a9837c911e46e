"""Telling characters apart: a regularised least-squares classifier with a Gaussian kernel on gradient histograms.

Chosen over a small convolutional network because it is fitted in closed form within a second, reads better at this
sample size, and its scores decay to "don't know" far from everything it was shown. Features: N. Dalal and B. Triggs,
CVPR 2005; classifier: R. Rifkin et al., "Regularized least-squares classification", 2003, on a subset of centres
(A. Smola and B. Schoelkopf, ICML 2000).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvar.weights import read_weights

SIDE = 16  # pixels of a crop
BORDER = 1
ORIENTATIONS = 8
CELLS = 5  # a side, over which orientations are pooled
BANDWIDTH = 2.0  # the kernel is exp(-BANDWIDTH * squared distance)
RIDGE = 1e-4
NUM_FEATURES = ORIENTATIONS * CELLS**2 + (SIDE // 2) ** 2
SHARPNESS = 5.0  # of the softmax over scores, which lie about -1 and 1; set by calibration on held-out reader scans
JUNK = 10  # class of what is no digit


def gradient_features(crops: Tensor) -> Tensor:
    """(M, 16, 16) float32 in [0, 1] -> (M, 264): root histograms of gradients, and the crop at half its size."""
    padded = torch.nn.functional.pad(crops, (1, 1, 1, 1))
    gx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    gy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    angles = torch.arange(ORIENTATIONS) * (2 * math.pi / ORIENTATIONS)
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    along = (gx[:, None] * cosine + gy[:, None] * sine).clamp_(min=0)  # [M, 8, 16, 16]
    # The cube over the squared magnitude narrows each direction's share of a gradient.
    along = along.pow(3) / (gx.square() + gy.square() + 1e-6)[:, None]
    pixel = torch.arange(SIDE) + 0.5
    centre = (torch.arange(CELLS) + 0.5) * (SIDE / CELLS)
    pool = (1 - (pixel - centre[:, None]).abs() * (CELLS / SIDE)).clamp(min=0)  # [5, 16]
    cells = (pool @ along @ pool.T).flatten(1)
    histogram = torch.nn.functional.normalize((cells + 1e-4).sqrt(), dim=1)
    small = torch.nn.functional.avg_pool2d(crops[:, None], 2).flatten(1)
    return torch.cat([histogram, 0.5 * torch.nn.functional.normalize(small, dim=1)], dim=1)


def _kernel(features: Tensor, centres: Tensor) -> Tensor:
    """(M, F), (N, F) -> (M, N)."""
    product = features @ centres.T
    norms = features.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return product.mul_(2).sub_(norms).clamp_(max=0).mul_(BANDWIDTH).exp_()


@dataclass(frozen=True)
class CharacterClassifier:
    """Fitted classifier. centres: (N, F) float32 features; weights: (N, 11) float32, ten digits and junk."""

    centres: Tensor
    weights: Tensor

    @classmethod
    def fit(cls, crops: Tensor, classes: Tensor, num_centres: int) -> CharacterClassifier:
        """Fit to crops (M, 16, 16) float32 and classes (M,) in 0..10; the first `num_centres` crops are the centres."""
        features = gradient_features(crops)
        centres = features[:num_centres]
        targets = torch.nn.functional.one_hot(classes, JUNK + 1).float() * 2 - 1
        kernel = _kernel(features, centres)
        # Normal equations of min |K w - t|^2 / M + RIDGE w' K_cc w, in float64 because they square K's condition.
        normal = (kernel.T @ kernel).double() / len(crops) + RIDGE * kernel[:num_centres].double()
        normal.diagonal().add_(1e-6)
        weights = torch.cholesky_solve((kernel.T @ targets).double() / len(crops), torch.linalg.cholesky(normal))
        return cls(centres.contiguous(), weights.float().contiguous())

    def probabilities(self, crops: Tensor) -> Tensor:
        """(M, 16, 16) float32 -> (M, 11) float32. Far from everything known, all are alike."""
        scores = _kernel(gradient_features(crops), self.centres) @ self.weights
        return torch.softmax(SHARPNESS * scores, dim=1)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        save_file({"centres": self.centres, "weights": self.weights}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> CharacterClassifier:
        """Read what `save` wrote. Raises ValueError if it is something else."""
        tensors = read_weights(path, "CharacterClassifier: path")
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"CharacterClassifier: path: expected tensors by name, got something else in {path}")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        count = shapes.get("centres", (0,))[0]
        if shapes != {"centres": (count, NUM_FEATURES), "weights": (count, JUNK + 1)}:
            expected = f"centres (N, {NUM_FEATURES}) and weights (N, {JUNK + 1})"
            raise ValueError(f"CharacterClassifier: path: expected {expected}, got {shapes} in {path}")
        return cls(tensors["centres"], tensors["weights"])
