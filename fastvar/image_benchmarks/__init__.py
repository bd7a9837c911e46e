"""Benchmarks of images, a model's or anybody's: scores by image on disk, one summary with intervals, a picture.

Importing this package is cheap: networks and the packages they need come with the rewards that it is given.
"""

from fastvar.image_benchmarks.cvtg import CVTG2K, count_words
from fastvar.image_benchmarks.detection import Detector, Found, Mask2Former
from fastvar.image_benchmarks.drawing import draw_items
from fastvar.image_benchmarks.dreambench import DreamBench
from fastvar.image_benchmarks.fid import FID, class_items, folder_items
from fastvar.image_benchmarks.geneval import GenEval
from fastvar.image_benchmarks.items import Item, taken_prompts
from fastvar.image_benchmarks.prompts import HPSBenchmark, PromptBenchmark
from fastvar.image_benchmarks.scoring import Benchmark, run_benchmark, score_files

__all__ = [
    "CVTG2K",
    "FID",
    "Benchmark",
    "Detector",
    "DreamBench",
    "Found",
    "GenEval",
    "HPSBenchmark",
    "Item",
    "Mask2Former",
    "PromptBenchmark",
    "class_items",
    "count_words",
    "draw_items",
    "folder_items",
    "run_benchmark",
    "score_files",
    "taken_prompts",
]
