"""The table of the kinds of subject."""

from __future__ import annotations

from benchmarks import records
from benchmarks.injections import FIGURES, PAGE, ROWS, table


def test_table_in_the_documentation_is_that_of_the_rows() -> None:
    assert table(records.read(ROWS)) in PAGE.read_text()


def test_means_and_intervals_over_seeds() -> None:
    shared = {"subject": "interleaved", "own_tokens": True}
    figures = dict.fromkeys(FIGURES, 0.5)
    rows = [{**shared, **figures, "seed": seed, "ink": ink} for seed, ink in enumerate((0.3, 0.4, 0.5))]
    *_, line = table(rows).splitlines()
    same = "50.0 (50.0 to 50.0)"  # and 40 +- 4.303 x 10 / sqrt(3)
    assert line == f"| `interleaved` | own | {same} | {same} | 40.0 (15.2 to 64.8) | {same} | 3 |"
