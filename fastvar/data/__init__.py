"""Data: folders of images, images with texts, what readers give, and metrics.

Importing this package does not import torchvision: it is asked for on first use.
"""

from fastvar.data.folder import ImageFolder
from fastvar.data.metrics import diversity, mean_interval, normalised_edit_distance, wilson_interval, word_accuracy
from fastvar.data.pairs import SubjectPairs
from fastvar.data.prompt_sets import TextPrompt, make_prompts, read_prompts
from fastvar.data.reader import Reader, Reading
from fastvar.data.regions import draw_by_regions
from fastvar.data.text_images import TextImages

__all__ = [
    "ImageFolder",
    "Reader",
    "Reading",
    "SubjectPairs",
    "TextImages",
    "TextPrompt",
    "diversity",
    "draw_by_regions",
    "make_prompts",
    "mean_interval",
    "normalised_edit_distance",
    "read_prompts",
    "wilson_interval",
    "word_accuracy",
]
