"""Images and prompts by how many regions of text they have: filtered for training, drawn to a target for evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from fastvar.random import derive

MORE = 6  # the bin of six regions and more
TARGET = {2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}  # of an evaluation set over 2 to 5 regions


def region_bins(regions: Sequence[int]) -> dict[int, list[int]]:
    """The items of each bin that has some: of 1, 2, 3, 4, 5 regions, and under 6 those of more; 0 has none of them."""
    bins: dict[int, list[int]] = {}
    for item, number in enumerate(regions):
        bins.setdefault(min(number, MORE), []).append(item)
    return dict(sorted(bins.items()))


def quotas(shares: Mapping[int, float], size: int) -> dict[int, int]:
    """How many of `size` items each bin gets: its share, rounded so that they add up (largest remainders, of equal ones
    the smaller bin's first). Shares need not add up to 1.

    Raises:
        ValueError: no shares, or one that is negative or not finite.
    """
    total = sum(shares.values())
    if not shares or any(not 0 <= share < math.inf for share in shares.values()) or total <= 0:
        raise ValueError(f"quotas: shares: expected numbers from 0 on that are not all 0, got {dict(shares)}")
    exact = {number: size * share / total for number, share in sorted(shares.items())}
    found = {number: math.floor(value + 1e-9) for number, value in exact.items()}
    remainders = sorted(exact, key=lambda number: (round(found[number] - exact[number], 9), number))
    for number in remainders[: size - sum(found.values())]:
        found[number] += 1
    return found


def with_regions(regions: Sequence[int], bins: Sequence[int]) -> list[int]:
    """The items of some bins, in their order: a training set."""
    return [item for item, number in enumerate(regions) if min(number, MORE) in bins]


def draw_by_regions(
    regions: Sequence[int], size: int | None = None, *, shares: Mapping[int, float] = TARGET, seed: int = 0
) -> list[int]:
    """Items drawn at random, none twice, so that their bins have given shares: an evaluation set, in their order.

    Args:
        regions: of each item.
        size: how many; None for as many as there can be.
        shares: by bin, 1 to 6 (six and more); see `quotas`.
        seed: of the draw. A bin's items are drawn in the same order whatever the size and the other bins.

    Raises:
        ValueError: a bin with a share that has too few items; names it.
    """
    bins = region_bins(regions)
    if size is None:
        size = largest_draw(regions, shares)
    chosen: list[int] = []
    for number, wanted in quotas(shares, size).items():
        items = bins.get(number, [])
        if len(items) < wanted or (not items and shares[number]):
            raise ValueError(
                f"draw_by_regions: regions: expected at least {max(wanted, 1)} items with {number} regions"
                f"{' or more' if number == MORE else ''}, got {len(items)}"
            )
        generator = torch.Generator().manual_seed(derive(seed, "regions", number))
        order = torch.randperm(len(items), generator=generator)[:wanted]
        chosen += [items[place] for place in order.tolist()]
    return sorted(chosen)


def largest_draw(regions: Sequence[int], shares: Mapping[int, float] = TARGET) -> int:
    """The largest size that `draw_by_regions` can give; 0 where a bin with a share is empty."""
    have = {number: len(items) for number, items in region_bins(regions).items()}
    wanted = {number: share for number, share in shares.items() if share}
    if any(number not in have for number in wanted):
        return 0
    size = min(math.floor((have[number] + 1) * sum(wanted.values()) / share) for number, share in wanted.items())
    while any(quota > have[number] for number, quota in quotas(wanted, size).items()):
        size -= 1
    return size
