"""Tables of tiles: which row a call takes, and that every table has a tile for every card."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from fastvar.kernels.block_causal_attention.tiles import BACKWARD_KV, BACKWARD_PREFIX, BACKWARD_Q, FORWARD
from fastvar.kernels.cached_attention.tiles import PART
from fastvar.kernels.common.tiling import NO_CARD, SHARED, Card, Row, Table, card, family_of

from fastvar.tuning import load_tables

CARDS = [Card("", family, shared) for family, shared in SHARED.items()]


def test_families() -> None:
    found = {(8, 0): "sm80", (8, 6): "sm89", (8, 7): "sm80", (8, 9): "sm89", (9, 0): "sm90", (10, 0): "sm100"}
    found |= {(10, 3): "sm100", (12, 0): "sm120", (12, 1): "sm120", (7, 5): "sm80", (9, 9): "sm90"}
    assert {capability: family_of(capability) for capability in found} == found
    assert card(torch.device("cpu")) == NO_CARD


def test_the_first_row_that_fits() -> None:
    table = Table(
        "toy.rows",
        (
            Row({"BLOCK": 128}, "sm90", {"head_dim": 64}),
            Row({"BLOCK": 96}, "sm90", {"head_dim": 64, "length": 100}),  # never: the one before it holds for more
            Row({"BLOCK": 64}, most={"head_dim": 64, "length": 100}),
            Row({"BLOCK": 32}),
            Row({"BLOCK": 16}),
        ),
        shared=lambda tile, key: tile["BLOCK"] * key["head_dim"] * 64,
    )
    by_name = {each.family: each for each in CARDS}

    def chosen(family: str, **key: int) -> int:
        return table.choose(by_name[family], **key)["BLOCK"]

    assert chosen("sm90", head_dim=16, length=10) == 128 and chosen("sm90", head_dim=65, length=10) == 32
    assert chosen("sm80", head_dim=32, length=100) == 64 and chosen("sm80", head_dim=32, length=101) == 32
    assert chosen("sm89", head_dim=32, length=100) == 32  # 64 rows are too many for its shared memory
    assert chosen("sm89", head_dim=64, length=100) == 16
    with pytest.raises(ValueError, match=r"toy.rows: no tile fits {'head_dim': 4096} on Card\("):
        table.choose(by_name["sm89"], head_dim=4096)
    tile = table.choose(NO_CARD, head_dim=1, length=1)
    tile["BLOCK"] = 0  # the caller's own
    assert table.choose(NO_CARD, head_dim=1, length=1)["BLOCK"] == 128
    del load_tables()["toy.rows"]  # type: ignore[attr-defined]


def keys(table: Table) -> list[dict[str, int]]:
    """Numbers at the table's bounds and past them."""
    bounds: dict[str, set[int]] = {"bits": {16, 32}, "head_dim": {16, 64, 80, 128, 256}}
    for row in table.rows:
        for name, bound in row.most.items():
            if name not in ("bits", "head_dim"):
                bounds.setdefault(name, {1, 1 << 20}).update({bound, bound + 1})
    return [dict(zip(bounds, values, strict=True)) for values in product(*map(sorted, bounds.values()))]


@pytest.mark.parametrize("name", sorted(load_tables()))
def test_every_table_has_a_tile_for_every_card(name: str) -> None:
    table = load_tables()[name]
    names = set(table.rows[0].tile)
    assert table.rows[-1].family is None and all(set(row.tile) == names for row in table.rows)
    assert set(table.candidates) <= names  # of which `fastvar tune` makes tiles
    for here, key in product(CARDS, keys(table)):
        tile: Any = table.choose(here, **key)
        assert set(tile) == names and table.shared(tile, key) <= here.shared
    for row in table.rows:
        assert row.family in (None, *SHARED) and (row.family is None or row.source or row.most), row
        assert row.tile.get("num_warps", 4) in (1, 2, 4, 8, 16, 32) and 1 <= row.tile.get("num_stages", 1) <= 8, row


def test_attention_has_tiles_for_every_card() -> None:
    """For head dimensions up to 256."""
    sizes = product(CARDS, (FORWARD, BACKWARD_Q, BACKWARD_KV, BACKWARD_PREFIX, PART), (16, 32), (8, 64, 80, 192, 256))
    for here, table, bits, head_dim in sizes:
        for size in (1, 680, 10521):
            key = {"bits": bits, "head_dim": head_dim, "queries" if table is PART else "length": size}
            assert table.choose(here, **key)["BLOCK_M"] >= 16
