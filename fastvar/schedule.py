"""The scale schedule: the K token grids of a visual autoregressive model, coarse to fine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise

Grid = tuple[int, int]


@dataclass(frozen=True)
class ScaleSchedule:
    """K token grids (height, width), coarse to fine; the one language that operators and models share.

    Tokens are ordered scale by scale and row by row within a scale. A token of scale k sees every token of scales <= k
    (block-causal): key j is visible to a query of scale k iff j < ends[k].

    Args:
        grids: K pairs (height, width), or K ints for square grids. No side may shrink from one scale to the next.

    Attributes:
        grids: (K,) pairs (height, width).
        lengths: (K,) tokens of each scale, n_k = h_k w_k.
        starts: (K,) index of each scale's first token.
        ends: (K,) tokens up to and including each scale, e_k = n_1 + ... + n_k.
        flat: (2K,) the sides h_1, w_1, h_2, w_2, ...: how a schedule travels through an operator's schema.

    Raises:
        ValueError: empty schedule, a side below 1, or a coarser grid after a finer one.
    """

    grids: tuple[Grid, ...]
    # Computed at once rather than cached on first use: a cached_property's lock breaks torch.compile on Python 3.11.
    lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)
    starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    ends: tuple[int, ...] = field(init=False, repr=False, compare=False)
    flat: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __init__(self, grids: Iterable[int | Sequence[int]]) -> None:
        if not isinstance(grids, Iterable):
            raise ValueError(f"ScaleSchedule: grids: expected a sequence of grids, got {grids!r}")
        object.__setattr__(self, "grids", tuple(_as_grid(grid) for grid in grids))
        if not self.grids:
            raise ValueError("ScaleSchedule: grids: expected at least one grid, got none")
        for k, (coarse, fine) in enumerate(pairwise(self.grids)):
            if fine[0] < coarse[0] or fine[1] < coarse[1]:
                raise ValueError(
                    "ScaleSchedule: grids: expected sides that never shrink, "
                    f"got {fine[0]}x{fine[1]} (scale {k + 1}) after {coarse[0]}x{coarse[1]}"
                )
        lengths = tuple(h * w for h, w in self.grids)
        ends = tuple(accumulate(lengths))
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "starts", (0, *ends[:-1]))
        object.__setattr__(self, "ends", ends)
        object.__setattr__(self, "flat", tuple(side for grid in self.grids for side in grid))

    def __len__(self) -> int:
        """K, the number of scales."""
        return len(self.grids)

    def __iter__(self) -> Iterator[Grid]:
        return iter(self.grids)

    def __getitem__(self, scale: int) -> Grid:
        return self.grids[scale]

    @property
    def num_tokens(self) -> int:
        """L, the tokens of all scales."""
        return self.ends[-1]

    @property
    def finest(self) -> Grid:
        """(height, width) of the last grid."""
        return self.grids[-1]

    @property
    def scale_of_token(self) -> tuple[int, ...]:
        """(L,) the scale index of each token."""
        return tuple(k for k, length in enumerate(self.lengths) for _ in range(length))

    @property
    def visible_ends(self) -> tuple[int, ...]:
        """(L,) for each query the number of keys it sees; key j is visible iff j < visible_ends[query]."""
        return tuple(self.ends[k] for k in self.scale_of_token)

    @classmethod
    def from_flat(cls, flat: Sequence[int]) -> ScaleSchedule:
        """The schedule whose `flat` this is.

        Raises:
            ValueError: an odd number of sides, or not a schedule.
        """
        return _from_flat(tuple(flat))

    def truncated(self, num_scales: int) -> ScaleSchedule:
        """The first `num_scales` scales.

        Raises:
            ValueError: num_scales outside 1..K.
        """
        if not 1 <= num_scales <= len(self):
            raise ValueError(
                f"ScaleSchedule.truncated: num_scales: expected 1 to {len(self)}, got {num_scales}",
            )
        return ScaleSchedule(self.grids[:num_scales])

    def with_num_tokens(self, num_tokens: int) -> ScaleSchedule:
        """The truncated schedule that has exactly `num_tokens` tokens.

        Raises:
            ValueError: no scale ends at that token.
        """
        if num_tokens not in self.ends:
            raise ValueError(
                f"ScaleSchedule.with_num_tokens: num_tokens: expected one of {self.ends}, got {num_tokens}",
            )
        return self.truncated(self.ends.index(num_tokens) + 1)

    def __str__(self) -> str:
        return ",".join(str(h) if h == w else f"{h}x{w}" for h, w in self.grids)

    @classmethod
    def parse(cls, text: str) -> ScaleSchedule:
        """The inverse of `str`: "1,2,4,4x8", or the name of a preset such as "var-256" or "infinity-1M-1.500".

        Raises:
            ValueError: neither a preset nor a list of grids.
        """
        if text in PRESETS:
            return PRESETS[text]
        try:
            return cls([[int(side) for side in item.split("x")] for item in text.split(",")])
        except ValueError as error:
            if str(error).startswith("ScaleSchedule"):
                raise
            raise ValueError(
                f'ScaleSchedule.parse: text: expected a preset or grids such as "1,2,4,4x8", got {text!r}'
            ) from error


def _as_grid(grid: int | Sequence[int]) -> Grid:
    sides = tuple(grid) if isinstance(grid, Sequence) else (grid,)
    if len(sides) == 1:
        sides = (sides[0], sides[0])
    # bool is an int, but nobody means a grid by it
    if len(sides) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sides):
        raise ValueError(f"ScaleSchedule: grids: expected positive ints or pairs (height, width), got {grid!r}")
    return sides[0], sides[1]


@lru_cache(maxsize=256)
def _from_flat(flat: tuple[int, ...]) -> ScaleSchedule:
    if len(flat) % 2:
        raise ValueError(f"ScaleSchedule.from_flat: flat: expected pairs of sides, got {len(flat)} sides")
    return ScaleSchedule(tuple(zip(flat[::2], flat[1::2], strict=True)))


# FoundationVision/VAR (arXiv 2404.02905), NextFlow (arXiv 2601.02204).
VAR_256 = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
VAR_512 = ScaleSchedule((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
VAR_1024 = ScaleSchedule((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
NEXTFLOW_1024 = ScaleSchedule((*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 48, 64))

# Infinity (arXiv 2412.04431): per aspect ratio height / width the 13 grids of the 1M-pixel budget. A smaller budget
# takes the first scales of the same list.
_INFINITY_GRIDS: dict[str, str] = {
    "1.000": "1,2,4,6,8,12,16,20,24,32,40,48,64",
    "1.250": "1,2,3,5x4,10x8,15x12,20x16,25x20,30x24,35x28,45x36,55x44,70x56",
    "1.333": "1,2,4x3,8x6,12x9,16x12,20x15,24x18,28x21,36x27,48x36,60x45,72x54",
    "1.500": "1,2,3x2,6x4,9x6,15x10,21x14,27x18,33x22,39x26,48x32,63x42,78x52",
    "1.750": "1,2,3,7x4,11x6,14x8,21x12,28x16,35x20,42x24,56x32,70x40,84x48",
    "2.000": "1,2,4x2,6x3,10x5,16x8,22x11,30x15,38x19,46x23,60x30,74x37,90x45",
    "2.500": "1,2,5x2,10x4,15x6,20x8,25x10,30x12,40x16,50x20,65x26,80x32,100x40",
    "3.000": "1,2,6x2,9x3,15x5,21x7,27x9,36x12,45x15,54x18,72x24,90x30,111x37",
}
_INFINITY_SCALES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
INFINITY_BUDGETS = tuple(_INFINITY_SCALES)


def infinity_schedule(budget: str = "1M", ratio: str = "1.000") -> ScaleSchedule:
    """A schedule of Infinity.

    Args:
        budget: pixels of the image: "0.06M", "0.25M", "0.60M" or "1M".
        ratio: height / width with three decimals, from "0.333" to "3.000"; below 1 the grids are transposed
            and the name is truncated as Infinity does ("0.666" for 2:3).

    Raises:
        ValueError: unknown budget or ratio.
    """
    name = f"infinity-{budget}-{ratio}"
    if name not in PRESETS:
        raise ValueError(
            f"infinity_schedule: budget, ratio: expected one of {INFINITY_BUDGETS} and one of {infinity_ratios()}, "
            f"got {budget!r} and {ratio!r}"
        )
    return PRESETS[name]


def infinity_ratios() -> tuple[str, ...]:
    """The ratios of height to width that `infinity_schedule` knows, from wide to tall."""
    return tuple(sorted(name.rsplit("-", 1)[1] for name in PRESETS if name.startswith("infinity-1M-")))


def _infinity_presets() -> dict[str, ScaleSchedule]:
    presets = {}
    for ratio, text in _INFINITY_GRIDS.items():
        tall = ScaleSchedule.parse(text)
        shapes = {ratio: tall}
        if ratio != "1.000":
            inverse = int(1 / float(ratio) * 1000) / 1000
            shapes[f"{inverse:.3f}"] = ScaleSchedule([(w, h) for h, w in tall])
        for name, schedule in shapes.items():
            for budget, num_scales in _INFINITY_SCALES.items():
                presets[f"infinity-{budget}-{name}"] = schedule.truncated(num_scales)
    return presets


PRESETS: dict[str, ScaleSchedule] = {
    "var-256": VAR_256,
    "var-512": VAR_512,
    "var-1024": VAR_1024,
    "nextflow-1024": NEXTFLOW_1024,
}
PRESETS.update(_infinity_presets())
