"""The scale schedule: presets, construction and its errors, text form, visibility, use in compiled code."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from fastvar.schedule import NEXTFLOW_1024, PRESETS, VAR_256, VAR_512, VAR_1024, ScaleSchedule, infinity_schedule

BUDGETS = ("0.06M", "0.25M", "0.60M", "1M")
# Infinity's token counts per budget, for height / width and its inverse, whose grids are transposed.
INFINITY_TOKENS = {
    ("1.000", "1.000"): (521, 2521, 6425, 10521),
    ("1.250", "0.800"): (614, 2814, 6854, 10774),
    ("1.333", "0.750"): (665, 2657, 7085, 10973),
    ("1.500", "0.666"): (533, 2759, 6941, 10997),
    ("1.750", "0.571"): (472, 2628, 7220, 11252),
    ("2.000", "0.500"): (451, 2681, 7219, 11269),
    ("2.500", "0.400"): (555, 2555, 6805, 10805),
    ("3.000", "0.333"): (509, 2588, 7016, 11123),
}
RECTANGLES = ScaleSchedule((1, (1, 2), (3, 2), (3, 5)))


def test_square_presets() -> None:
    schedules = (VAR_256, VAR_512, VAR_1024, NEXTFLOW_1024)
    assert [s.num_tokens for s in schedules] == [680, 2240, 9451, 10084]
    assert [len(s) for s in schedules] == [10, 10, 14, 18]
    assert [s.finest for s in schedules] == [(16, 16), (32, 32), (64, 64), (64, 64)]


@pytest.mark.parametrize(("ratio", "inverse"), INFINITY_TOKENS)
def test_infinity_presets(ratio: str, inverse: str) -> None:
    tall = [infinity_schedule(budget, ratio) for budget in BUDGETS]
    wide = [infinity_schedule(budget, inverse) for budget in BUDGETS]
    for schedules in (tall, wide):
        assert tuple(s.num_tokens for s in schedules) == INFINITY_TOKENS[ratio, inverse]
        assert [len(s) for s in schedules] == [7, 10, 12, 13]
    for a, b in zip(tall, wide, strict=True):
        assert b.grids == tuple((w, h) for h, w in a)
    height, width = tall[-1].finest
    assert height / width == pytest.approx(float(ratio), abs=0.06)


def test_there_are_no_other_presets() -> None:
    shapes = {shape for pair in INFINITY_TOKENS for shape in pair}
    infinity = {f"infinity-{budget}-{shape}" for budget in BUDGETS for shape in shapes}
    assert set(PRESETS) == {"var-256", "var-512", "var-1024", "nextflow-1024"} | infinity


def test_unknown_infinity_preset() -> None:
    for budget, ratio in (("2M", "1.000"), ("1M", "1.1"), ("1M", "0.667")):
        with pytest.raises(ValueError, match=r"infinity_schedule: budget, ratio: .*'0\.06M'.*'0\.666'"):
            infinity_schedule(budget, ratio)


def test_attributes() -> None:
    assert RECTANGLES.grids == ((1, 1), (1, 2), (3, 2), (3, 5))
    assert RECTANGLES.lengths == (1, 2, 6, 15)
    assert RECTANGLES.starts == (0, 1, 3, 9)
    assert RECTANGLES.ends == (1, 3, 9, 24)
    assert RECTANGLES.flat == (1, 1, 1, 2, 3, 2, 3, 5)
    assert RECTANGLES.scale_of_token == (0,) + (1,) * 2 + (2,) * 6 + (3,) * 15
    assert list(RECTANGLES) == [RECTANGLES[k] for k in range(len(RECTANGLES))]
    assert ScaleSchedule([[1], 2, [3, 3]]) == ScaleSchedule((1, (2, 2), 3))


@pytest.mark.parametrize(
    "grids",
    [
        (),
        (0,),
        (-1,),
        ((2, 0),),
        (1.0,),
        ((1, 2.0),),
        (True,),
        ("2",),
        (None,),
        ((1, 2, 3),),
        ((),),
        (2, 1),
        ((2, 2), (3, 1)),
        ((2, 2), (1, 9)),
    ],
)
def test_wrong_grids(grids: Any) -> None:
    with pytest.raises(ValueError, match="ScaleSchedule: grids: expected"):
        ScaleSchedule(grids)


def test_a_shrinking_grid_is_named() -> None:
    with pytest.raises(ValueError, match=r"3x1 \(scale 2\) after 2x2"):
        ScaleSchedule((1, 2, (3, 1)))


def test_truncation() -> None:
    for k in range(1, len(RECTANGLES) + 1):
        short = RECTANGLES.truncated(k)
        assert short.grids == RECTANGLES.grids[:k]
        assert short == RECTANGLES.with_num_tokens(RECTANGLES.ends[k - 1])
    for k in (0, -1, 5):
        with pytest.raises(ValueError, match="num_scales: expected 1 to 4"):
            RECTANGLES.truncated(k)
    for count in (0, 2, 25):
        with pytest.raises(ValueError, match=r"num_tokens: expected one of \(1, 3, 9, 24\)"):
            RECTANGLES.with_num_tokens(count)


def test_text_and_flat_round_trips() -> None:
    for schedule in (RECTANGLES, *PRESETS.values()):
        assert ScaleSchedule.parse(str(schedule)) == schedule
        assert ScaleSchedule.from_flat(schedule.flat) == schedule
        assert ScaleSchedule.from_flat(list(schedule.flat)) == schedule


def test_parse() -> None:
    assert str(RECTANGLES) == "1,1x2,3x2,3x5"
    assert ScaleSchedule.parse("1, 2, 4x8") == ScaleSchedule((1, 2, (4, 8)))
    assert ScaleSchedule.parse("infinity-1M-1.500") is infinity_schedule("1M", "1.500")
    for text in ("", "1,,2", "2x", "infinity-1M", "1.5"):
        with pytest.raises(ValueError, match=r"ScaleSchedule\.parse: text: expected"):
            ScaleSchedule.parse(text)
    for text in ("2,1", "0", "1x2x3"):
        with pytest.raises(ValueError, match="ScaleSchedule: grids: expected"):
            ScaleSchedule.parse(text)


def test_wrong_flat() -> None:
    with pytest.raises(ValueError, match=r"ScaleSchedule\.from_flat: flat: expected pairs of sides, got 3"):
        ScaleSchedule.from_flat((1, 1, 2))


def test_value_semantics() -> None:
    same = ScaleSchedule([(1, 1), (1, 2), (3, 2), (3, 5)])
    assert same == RECTANGLES and hash(same) == hash(RECTANGLES)
    assert {same: "found"}[RECTANGLES] == "found"
    assert RECTANGLES.truncated(3) != RECTANGLES
    for copied in (copy.deepcopy(RECTANGLES), pickle.loads(pickle.dumps(RECTANGLES))):
        assert copied == RECTANGLES and copied.ends == RECTANGLES.ends
    with pytest.raises(AttributeError):
        RECTANGLES.grids = ((1, 1),)  # type: ignore[misc]


@pytest.mark.parametrize("schedule", [RECTANGLES, ScaleSchedule((3,)), ScaleSchedule((2, 2, 3))], ids=str)
def test_visible_ends(schedule: ScaleSchedule) -> None:
    """The closed form j < visible_ends[i] against the definition, the key's scale is not finer than the query's."""
    scales = [k for k, (h, w) in enumerate(schedule.grids) for _ in range(h * w)]
    for query, end in enumerate(schedule.visible_ends):
        assert [key < end for key in range(len(scales))] == [scale <= scales[query] for scale in scales]


def test_inside_compiled_code() -> None:
    def sums(x: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        short = schedule.with_num_tokens(x.shape[1]).truncated(2)
        return torch.stack([x[:, a:b].sum(1) * len(short) for a, b in zip(short.starts, short.ends, strict=True)])

    torch._dynamo.reset()
    compiled = torch.compile(sums, fullgraph=True, backend="eager", dynamic=False)
    for schedule in (VAR_256, RECTANGLES):
        x = torch.arange(float(schedule.num_tokens))[None]
        assert torch.equal(compiled(x, schedule), sums(x, schedule))
