"""propagate_mask and boxes_to_mask against their definition, written out token by token."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from fastvar import ops
from fastvar.ops import ResidualConv, _checks, accumulate_scale, boxes_to_mask, propagate_mask
from fastvar.ops._dispatch import REGISTRY
from fastvar.schedule import PRESETS, VAR_256, ScaleSchedule
from tests.helpers.bounds import assert_as_accurate
from tests.helpers.samples import noise

RECTANGLES = ScaleSchedule((1, (2, 3), (2, 5), (5, 7), (5, 7)))
ON_CPU = [
    each.backend
    for each in REGISTRY["propagate_mask"]
    if (not each.devices or "cpu" in each.devices) and each.missing() is None
]
in_cpp = pytest.mark.skipif("cpu" not in ON_CPU, reason="the cpu extension is not built")


def interval(i: int, coarse: int, fine: int, footprint: str) -> list[int]:
    """The fine cells under token i along one axis."""
    if footprint == "area":
        return list(range(math.floor(i * fine / coarse), math.ceil((i + 1) * fine / coarse)))
    cells = []
    for y in range(fine):
        source = (y + 0.5) * coarse / fine - 0.5
        taps = range(math.floor(source) - 1, math.floor(source) + 3) if coarse != fine else [y]
        if i in [min(max(tap, 0), coarse - 1) for tap in taps]:
            cells.append(y)
    return [y for y in range(fine) if {y - 1, y, y + 1} & set(cells)]


@pytest.mark.parametrize("footprint", ["area", "support"])
def test_definition(footprint: str) -> None:
    """Forty tokens of every preset, in two masks: a thin one and a thick one."""
    for name, schedule in PRESETS.items():
        height, width = schedule.finest
        draw = random.Random(name)
        numbers = noise(2, height, width, dtype=torch.float64)
        mask = torch.stack([numbers[0] > 2.5, numbers[1] > 0])
        hard = torch.stack([propagate_mask(mask, schedule, footprint=footprint, backend=b) for b in ON_CPU])
        soft = torch.stack([propagate_mask(mask, schedule, footprint=footprint, soft=True, backend=b) for b in ON_CPU])
        assert hard.dtype == torch.bool and soft.dtype == torch.float32
        assert hard.shape == soft.shape == (len(ON_CPU), 2, schedule.num_tokens)
        for token in {0, schedule.num_tokens - 1, *draw.choices(range(schedule.num_tokens), k=40)}:
            k = schedule.scale_of_token[token]
            i, j = divmod(token - schedule.starts[k], schedule[k][1])
            rows = interval(i, schedule[k][0], height, footprint)
            columns = interval(j, schedule[k][1], width, footprint)
            covered = mask[:, rows][:, :, columns].double().mean((1, 2))
            for i, backend in enumerate(ON_CPU):
                assert torch.equal(hard[i, :, token], covered > 0), backend
                torch.testing.assert_close(soft[i, :, token].double(), covered, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("footprint", ["area", "support"])
def test_every_token_of_rectangles(footprint: str, backend: str) -> None:
    mask = noise(3, 5, 7).clamp(0, 1)
    soft = propagate_mask(mask, RECTANGLES, footprint=footprint, soft=True, backend=backend)
    expected = []
    for h, w in RECTANGLES:
        for i in range(h):
            for j in range(w):
                part = mask[:, interval(i, h, 5, footprint)][:, :, interval(j, w, 7, footprint)]
                expected.append(part.mean((1, 2)))
    torch.testing.assert_close(soft, torch.stack(expected, 1))
    assert torch.equal(propagate_mask(mask, RECTANGLES, footprint=footprint, backend=backend), soft > 0)


@in_cpp
@pytest.mark.parametrize("footprint", ["area", "support"])
@pytest.mark.parametrize("name", ["var-512", "infinity-1M-1.500"])
def test_cpp_is_as_accurate_as_the_reference(name: str, footprint: str) -> None:
    schedule = PRESETS[name]
    mask = noise(2, *schedule.finest).abs().clamp(max=1)
    height, width = schedule.finest
    exact = []
    for h, w in schedule:
        rows = torch.tensor([[float(y in interval(i, h, height, footprint)) for y in range(height)] for i in range(h)])
        columns = torch.tensor([[float(x in interval(j, w, width, footprint)) for x in range(width)] for j in range(w)])
        sums = rows.double() @ mask.double() @ columns.double().T
        exact.append((sums / (rows.sum(1)[:, None] * columns.sum(1))).flatten(1))
    got, plain = (
        propagate_mask(mask, schedule, footprint=footprint, soft=True, backend=b) for b in ("cpu", "reference")
    )
    assert_as_accurate(got, plain, torch.cat(exact, 1))
    # and no token of few cells has lost digits to a sum over many
    torch.testing.assert_close(got.double(), torch.cat(exact, 1), rtol=2**-24, atol=0)


@in_cpp
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_that_share_an_image(threads: int) -> None:
    """What a CUDA block does index by index, by threads of a CPU: more than a row has columns, and fewer."""
    schedule = ScaleSchedule((1, 2, (3, 4), (5, 7), (6, 19)))
    mask = noise(2, 6, 19).clamp(min=0)
    for footprint in ("area", "support"):
        for soft in (False, True):
            for cells in (mask, mask > 0):
                expected = propagate_mask(cells, schedule, footprint=footprint, soft=soft, backend="cpu")
                out = torch.empty_like(expected)
                flags = schedule.flat, footprint == "support", threads
                torch.ops.fastvar_cpu.propagate_mask(cells, *flags, out)
                assert torch.equal(out, expected)


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"mask": torch.zeros(2, 7, 5)}, r"mask: expected shape \(\*, 5, 7\), got \(2, 7, 5\)"),
    ({"mask": torch.zeros(5, 7)}, r"mask: expected shape \(\*, 5, 7\), got \(5, 7\)"),
    ({"mask": torch.zeros(2, 5, 7, dtype=torch.uint8)}, "mask: expected another dtype"),
    ({"mask": torch.zeros(2, 7, 5).mT}, "mask: expected a contiguous tensor"),
    ({"grids": []}, "grids: expected height and width of each, got 0 numbers"),
    ({"grids": [2, 3, 5]}, "grids: expected height and width of each, got 3 numbers"),
    ({"grids": [2, 0, 5, 7]}, "grids: expected 1 to 7, got 0"),
    ({"grids": [6, 3, 5, 7]}, "grids: expected 1 to 5, got 6"),
    ({"grids": [2, 3, 5, 1 << 15]}, "grids: expected 1 to 16384, got 32768"),
    ({"threads": 0}, "threads: expected 1 to 1024, got 0"),
    ({"out": torch.zeros(2, 40)}, r"out: expected shape \(2, 41\), got \(2, 40\)"),
    ({"out": torch.zeros(2, 41, dtype=torch.float64)}, "out: expected another dtype"),
]


@in_cpp
@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS)
def test_the_op_refuses_what_does_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Called without the public function's checks, it reads and writes nothing past an end."""
    arguments: dict[str, Any] = {
        "mask": torch.zeros(2, 5, 7), "grids": [2, 3, 5, 7], "support": False, "threads": 1, "out": torch.zeros(2, 41),
    }  # fmt: skip
    torch.ops.fastvar_cpu.propagate_mask(**arguments)
    with pytest.raises(RuntimeError, match=f"propagate_mask: {message}"):
        torch.ops.fastvar_cpu.propagate_mask(**{**arguments, **wrong})


def test_debug_mode_refuses_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(1, 5, 7)
    mask[0, 2, 3], mask[0, 4, 4] = math.nan, math.inf
    propagate_mask(mask, RECTANGLES, soft=True)
    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(ValueError, match="propagate_mask: mask: expected finite numbers, got 2 that are not"):
        propagate_mask(mask, RECTANGLES, soft=True)
    propagate_mask(mask > 0, RECTANGLES)


@pytest.mark.parametrize("backend", ON_CPU)
def test_finest_scale_is_the_mask_itself(backend: str) -> None:
    def propagate_mask(*arguments: Any, **options: Any) -> torch.Tensor:
        return ops.propagate_mask(*arguments, **options, backend=backend)

    mask = noise(2, 16, 16) > 1
    tokens = propagate_mask(mask, VAR_256)
    assert torch.equal(tokens[:, VAR_256.starts[-1] :], mask.flatten(1))
    assert torch.equal(tokens[:, 0], mask.flatten(1).any(1))
    assert not propagate_mask(torch.zeros(1, 16, 16), VAR_256, footprint="support").any()
    assert propagate_mask(torch.ones(1, 16, 16), VAR_256, soft=True).eq(1).all()
    assert propagate_mask(mask[:0], VAR_256).shape == (0, 680)


@pytest.mark.parametrize("schedule", [RECTANGLES, ScaleSchedule((1, 2, 3, 6, 9))], ids=str)
def test_support_holds_every_cell_that_a_token_changes(schedule: ScaleSchedule) -> None:
    """A cell that a code changes through upsampling and phi turns its token on."""
    height, width = schedule.finest
    phi = ResidualConv(torch.ones(1, 1, 1, 3, 3), torch.zeros(1, 1), 0.5, (0,) * len(schedule))
    every_cell = torch.eye(height * width).view(-1, height, width) > 0
    tokens_on = propagate_mask(every_cell, schedule, footprint="support")  # [cell, token]
    codebook = torch.tensor([[0.0], [1.0]])
    empty = torch.zeros(1, 1, height, width)
    for k, length in enumerate(schedule.lengths):
        for i in range(length):
            tokens = torch.zeros(1, length, dtype=torch.int64)
            tokens[0, i] = 1
            changed = accumulate_scale(tokens, empty, codebook, schedule, k, phi=phi).feature_map.flatten().abs() > 1e-6
            assert tokens_on[changed, schedule.starts[k] + i].all()


def test_strides_and_dtypes() -> None:
    mask = noise(2, 7, 5).mT
    expected = propagate_mask((mask > 0).contiguous(), RECTANGLES)
    for other in (mask, mask.double(), mask.half(), mask > 0):
        assert torch.equal(propagate_mask(other, RECTANGLES), expected)
    assert not propagate_mask(mask.requires_grad_(), RECTANGLES, soft=True).requires_grad


def overlap(box: list[float], size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(grid, dtype=torch.bool)
    for y in range(grid[0]):
        for x in range(grid[1]):
            top, bottom = max(box[1], y * size[0] / grid[0]), min(box[3], (y + 1) * size[0] / grid[0])
            left, right = max(box[0], x * size[1] / grid[1]), min(box[2], (x + 1) * size[1] / grid[1])
            mask[y, x] = top < bottom and left < right
    return mask


def test_boxes_against_their_definition() -> None:
    draw = random.Random(0)
    size, grid = (80, 112), RECTANGLES.finest
    boxes = [[draw.uniform(-40, 130) for _ in range(4)] for _ in range(60)]
    boxes += [[0, 0, 16, 16], [16, 16, 32, 32], [112, 0, 200, 80], [-9, -9, 0, 0], [-9, -9, 500, 500], [5, 5, 5, 9]]
    got = boxes_to_mask(torch.tensor(boxes)[:, None], size, RECTANGLES)
    expected = torch.stack([overlap(box, size, grid) for box in torch.tensor(boxes).tolist()])
    assert torch.equal(got, expected)
    assert got[-6].sum() == 1 and got[-5].sum() == 1 and got[-2].all()
    assert not got[-4].any() and not got[-3].any() and not got[-1].any()


def test_boxes_of_one_image_are_joined() -> None:
    nan = math.nan
    boxes = [
        torch.tensor([[0.0, 0.0, 10.0, 10.0], [100.0, 70.0, 101.0, 71.0], [nan, 0.0, 99.0, 99.0]]),
        torch.zeros(0, 4),
        torch.tensor([[0, 0, nan, 50], [30, 0, 20, 50]]),
        torch.tensor([[-math.inf, 0, math.inf, 1]]),
    ]
    got = boxes_to_mask(boxes, (80, 112), RECTANGLES)
    assert got.shape == (4, 5, 7)
    assert got[0].nonzero().tolist() == [[0, 0], [4, 6]]
    assert not got[1].any() and not got[2].any()
    assert got[3].nonzero().tolist() == [[0, x] for x in range(7)]
    assert boxes_to_mask([], (80, 112), RECTANGLES).shape == (0, 5, 7)
    assert boxes_to_mask(torch.zeros(2, 0, 4), (80, 112), RECTANGLES).any() == torch.tensor(False)
    assert boxes_to_mask(torch.tensor([[[0, 0, 16, 16]]]), (80, 112), RECTANGLES).sum() == 1


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"mask": torch.zeros(2, 7, 5)}, r"mask: expected shape \(B, 5, 7\), got \(2, 7, 5\)"),
    ({"mask": torch.zeros(5, 7)}, r"mask: expected shape \(B, 5, 7\), got \(5, 7\)"),
    ({"mask": torch.zeros(2, 5, 7, dtype=torch.uint8)}, r"mask: expected a bool or floating-point tensor, got torch"),
    ({"schedule": "var-256"}, r"schedule: expected a ScaleSchedule, got str"),
    ({"footprint": "bicubic"}, r"footprint: expected 'area' or 'support', got 'bicubic'"),
]


@pytest.mark.parametrize(("wrong", "message"), MISTAKES)
def test_mistakes(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"propagate_mask: {message}"):
        propagate_mask(**{"mask": torch.zeros(2, 5, 7), "schedule": RECTANGLES, **wrong})


def test_box_mistakes() -> None:
    with pytest.raises(ValueError, match=r"boxes_to_mask: boxes: expected shape \(B, N, 4\), got \(3, 4\)"):
        boxes_to_mask(torch.zeros(3, 4), (80, 112), RECTANGLES)
    with pytest.raises(ValueError, match=r"boxes_to_mask: boxes\[1\]: expected shape \(N, 4\), got \(2, 5\)"):
        boxes_to_mask([torch.zeros(3, 4), torch.zeros(2, 5)], (80, 112), RECTANGLES)
    with pytest.raises(
        ValueError, match=r"boxes_to_mask: image_size: expected positive height and width, got \(0, 8\)"
    ):
        boxes_to_mask(torch.zeros(1, 3, 4), (0, 8), RECTANGLES)
    with pytest.raises(ValueError, match="boxes_to_mask: schedule: expected a ScaleSchedule, got int"):
        boxes_to_mask(torch.zeros(1, 3, 4), (8, 8), 16)  # type: ignore[arg-type]
