"""Data: handwriting scenes (the default that needs no download), a reader for them, and folders of images.

Importing this package imports neither scikit-learn nor scipy nor torchvision: they are asked for on first use.
"""

from fastvar.data.folder import ImageFolder
from fastvar.data.handwriting import HandwritingScenes
from fastvar.data.matching import ReferenceMatch, match_reference
from fastvar.data.metrics import diversity, mean_interval, normalised_edit_distance, wilson_interval, word_accuracy
from fastvar.data.reader import Reader, Reading
from fastvar.data.scans import scan_partition

__all__ = [
    "HandwritingScenes",
    "ImageFolder",
    "Reader",
    "Reading",
    "ReferenceMatch",
    "diversity",
    "match_reference",
    "mean_interval",
    "normalised_edit_distance",
    "scan_partition",
    "wilson_interval",
    "word_accuracy",
]
