"""A picture that shows some of a benchmark's images, a row for each group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvar.image_benchmarks.figures import rows_by_group
from fastvar.image_benchmarks.items import Item, as_tensor
from fastvar.pictures import image_grid, read_picture

COLUMNS, ROWS, SIDE = 8, 30, 128


def picture_grid(items: Sequence[Item], files: Sequence[Path]) -> Any:
    """A PIL image: of up to 30 groups, evenly spread, up to 8 images each, evenly spread; those of a subject behind a
    photograph of it. A single group takes all rows."""
    groups = list(rows_by_group(items).values())
    if len(groups) == 1:
        groups = [groups[0][i : i + COLUMNS] for i in range(0, len(groups[0]), COLUMNS)]
    lines = []
    for rows in _spread(groups, ROWS):
        first = list(items[rows[0]].references[:1])
        lines.append([*first, *(files[row] for row in _spread(rows, COLUMNS - len(first)))])
    columns = max(map(len, lines))
    white = torch.ones(3, SIDE, SIDE)
    cells = [_cell(line[i]) if i < len(line) else white for line in lines for i in range(columns)]
    return image_grid(torch.stack(cells), columns)


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _cell(file: Path) -> torch.Tensor:
    from PIL import ImageOps

    return as_tensor(ImageOps.pad(read_picture(file, "benchmark: images"), (SIDE, SIDE), color="white"))
