"""Handwriting: scenes of scanned digits, a reader for them, how well they are written, and the demo of all fastvar.

The library does not need it: `fastvar.builtin` finds it by name. Importing this package imports neither scikit-learn
nor scipy nor torchvision: they are asked for on first use.
"""

from fastvar.handwriting.dataset import HandwritingScenes
from fastvar.handwriting.matching import ReferenceMatch, match_reference
from fastvar.handwriting.mixed import MixedScenes
from fastvar.handwriting.reader import Reader
from fastvar.handwriting.scans import scan_partition

__all__ = ["HandwritingScenes", "MixedScenes", "Reader", "ReferenceMatch", "match_reference", "scan_partition"]
