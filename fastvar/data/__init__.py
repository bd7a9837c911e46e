"""Data: folders of images, what readers give, and metrics.

Importing this package does not import torchvision: it is asked for on first use.
"""

from fastvar.data.folder import ImageFolder
from fastvar.data.metrics import diversity, mean_interval, normalised_edit_distance, wilson_interval, word_accuracy
from fastvar.data.reader import Reader, Reading

__all__ = [
    "ImageFolder",
    "Reader",
    "Reading",
    "diversity",
    "mean_interval",
    "normalised_edit_distance",
    "wilson_interval",
    "word_accuracy",
]
