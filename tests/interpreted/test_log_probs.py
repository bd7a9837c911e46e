"""Log-probabilities and the policy loss in Triton over several tiles, parts of the vocabulary and parts of the rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar import ScaleSchedule, ops
from tests.helpers import edges
from tests.helpers.policy_losses import policy_loss
from tests.helpers.samples import noise
from tests.interpreted.test_kernels import check

scores = importlib.import_module("fastvar.kernels.token_log_probs.impl_triton")
tiles = importlib.import_module("fastvar.kernels.token_log_probs.tiles")


def problem(rows: int, size: int, width: int, *, bits: bool = False, seed: int = 0) -> dict[str, Any]:
    tokens = torch.randint(size, (1, rows), generator=torch.Generator().manual_seed(0))
    return {
        "hidden": noise(1, rows, width, seed=seed),
        "weight": noise(width, size, seed=seed + 1).T / width**0.5,
        "bias": noise(size, seed=seed + 2),
        "tokens": noise(1, rows, size, seed=9) > 0 if bits else tokens,
    }


def with_reference(rows: int, size: int, **options: Any) -> dict[str, Any]:
    other = problem(rows, size, 20, seed=4)
    head = (other["hidden"], other["weight"], other["bias"])
    return problem(rows, size, 36, **options) | {"reference_head": head, "temperature": 0.8}


NAMES = ("hidden", "weight", "bias")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs hold 64 logits, products have 16 rows, slopes 32."""
    tile = {"ELEMENTS": 64, "num_warps": 4}
    monkeypatch.setattr(tiles.LOGITS, "forced", tile)
    monkeypatch.setattr(scores, "PRODUCT", 1)
    monkeypatch.setattr(scores, "ROWS", (16, 16))
    monkeypatch.setattr(scores, "SLOPE_ROWS", (32, 32))
    monkeypatch.setattr(scores, "SHARE", 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("rows", "size", "reference", "bits"),
    [
        (20, 150, False, True),
        (20, 150, True, False),
        (3, 128, False, False),
        (3, 128, True, True),
        (35, 20, False, False),
        (35, 20, True, True),
        (1, 1, False, True),
        (1, 1, True, False),
    ],
)
def test_several_tiles(rows: int, size: int, reference: bool, bits: bool) -> None:
    """Rows in parts and several rows in a program, ragged ends, hidden sizes that are no power of two."""
    make = with_reference if reference else lambda *a, **o: problem(*a, 36, **o)
    check(ops.token_log_probs, make(rows, size, bits=bits), NAMES)
    if not reference:
        arguments = make(rows, size, bits=bits)
        check(ops.cross_entropy, {**arguments, "label_smoothing": 0.3, "weights": torch.arange(rows) % 3 + 0.0}, NAMES)


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize(
    ("rows", "settings", "most"),
    [
        (150, {"ROWS": (32, 32), "SLOPES": 1, "SLOPE_ROWS": (64, 64), "SHARE": 1}, 64),
        (150, {"ROWS": (16, 16), "SHARE": 2}, 80),  # 75, in whole products
        (300, {}, 300),
    ],
)
def test_slopes_of_some_rows_at_a_time(
    rows: int, settings: dict[str, Any], most: int, bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients as of all rows at once, to rounding, and memory for these rows alone."""
    arguments = with_reference(rows, 40, bits=bits)
    for name, value in settings.items():
        monkeypatch.setattr(scores, name, value)
    made: list[int] = []
    gradients = scores._Gradients.__init__

    def recorded(self: Any, *args: Any) -> None:
        gradients(self, *args)
        made.append(len(self.slopes))

    monkeypatch.setattr(scores._Gradients, "__init__", recorded)
    check(ops.token_log_probs, arguments, NAMES)
    assert made == [most]


@pytest.mark.parametrize("scale", [1.0, 1 / 43520])
def test_float16_gradients_of_a_mean_over_many_tokens(scale: float) -> None:
    """Slopes p_j / (B L) are below the least float16; the gradients, sums of many of them, are not."""
    arguments = problem(70, 1024, 36)
    arguments = {n: v.half() if v.is_floating_point() else v for n, v in arguments.items()}
    weights = torch.full((1, 70), scale, dtype=torch.float64)
    weights[0, 3], weights[0, 40] = 0, -scale / 8

    def gradients(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = {n: arguments[n].to(dtype, copy=True).requires_grad_() for n in NAMES}
        found = ops.token_log_probs(**arguments | leaves, backend=backend).log_probs
        return torch.autograd.grad(found, list(leaves.values()), weights.to(found.dtype))

    exact = gradients("reference", torch.float64)
    plain, found = (gradients(backend, torch.float16) for backend in ("reference", "triton"))
    for f, p, e in zip(found, plain, exact, strict=True):
        error, own = (float((t.double() - e).norm()) for t in (f, p))
        assert error <= 2 * own + torch.finfo(torch.float16).eps / 2 * float(e.norm()), (error, own, float(e.norm()))


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_gradients_are_multiplied_in_place(factor: float) -> None:
    x = noise(5000).half()
    expected = (x.float() * factor).half()
    scores.multiply(x, torch.tensor([factor]))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("value", [0.0, 1e-40, 2.0**-16, 1.0, 3.0, 1e30])
def test_scale_of_slopes(value: float) -> None:
    """A finite power of two that brings the largest below LARGEST, whatever is not finite elsewhere."""
    given = torch.tensor([value, -value / 2, torch.inf, -torch.inf, torch.nan, 1e38])
    scale = float(scores._scale([None, given, None, -given], 0, 5, 0.5))
    assert 0 < scale < torch.inf and torch.tensor(scale).frexp().mantissa == 0.5
    assert value < 2.0**-100 or scores.LARGEST / 2 <= scale * value / 2 < scores.LARGEST
    assert 1 / scale < 2.0**127


@pytest.mark.parametrize("bits", [False, True])
def test_bfloat16(bits: bool) -> None:
    """Both losses in one pass. The interpreter truncates where slopes are rounded: an error twice as large."""
    arguments = problem(70, 300, 36, bits=bits)
    loss = {"advantages": torch.tensor([0.7]), "schedule": ScaleSchedule(((7, 10),))}
    loss |= {"old_log_probs": noise(1, 70, seed=5) - 6, "entropy_weight": 0.1}
    for function, settings in ((ops.cross_entropy, {"label_smoothing": 0.2}), (policy_loss, loss)):
        found = []
        for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
            leaves = {n: arguments[n].bfloat16().to(dtype).requires_grad_() for n in NAMES}
            result = function(**arguments | leaves, **settings, backend=backend)
            found.append([result.loss.detach(), *torch.autograd.grad(result.loss, list(leaves.values()))])
        assert abs(float(found[0][0] - found[1][0])) < 1e-5 * abs(float(found[1][0]))
        for a, b in zip(found[0][1:], found[1][1:], strict=True):
            error = float((a.double() - b).norm() / b.norm())
            assert a.dtype == torch.bfloat16 and error < torch.finfo(torch.bfloat16).eps, error


def test_logits_of_several_tiles() -> None:
    arguments = {"hidden": 3 * noise(2, 20, 300), "weight": None, "bias": None}
    other = (noise(2, 20, 300, seed=1), None, None)
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    check(ops.token_log_probs, {**arguments, "tokens": tokens, "reference_head": other}, ("hidden",))
    sliced = noise(300, 2, 21)[:, :, 1:].permute(1, 2, 0)
    check(ops.token_log_probs, {**arguments, "hidden": sliced, "tokens": tokens}, ("hidden",))


@pytest.mark.parametrize("far", ["logits", "bits", "hidden", "weight"])
def test_strides_that_reach_beyond_32_bits(far: str, tmp_path: Path) -> None:
    """Elements of a row 2**25 or more apart, in a file with holes: the last ones lie beyond 2**31 elements."""

    def spread(values: torch.Tensor, stride: int) -> torch.Tensor:
        size = (values.shape[-1] - 1) * stride + values.numel()
        file = torch.from_file(str(tmp_path / "elements"), shared=True, size=size, dtype=values.dtype)
        return file.as_strided(values.shape, (*(1,) * (values.ndim - 1), stride)).copy_(values)

    arguments = problem(3, 20, 80, bits=far == "bits") | {"bias": None}
    given = far in ("logits", "bits")
    if given:
        arguments |= {"hidden": noise(1, 3, 20), "weight": None}
    close = {n: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    name = {"logits": "hidden", "bits": "tokens"}.get(far, far)
    apart = close | {name: spread(close[name], 2**27 if given else 2**25)}
    results = []
    for each in (close, apart):
        leaf = each["hidden"].detach().requires_grad_(given)  # the products behind the kernel are not Triton's
        found = ops.token_log_probs(**each | {"hidden": leaf}, backend="triton")
        results.append([found.log_probs, found.entropy])
        if given:
            results[-1] += torch.autograd.grad(found.log_probs.sum(), leaf)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_float32_head_of_half_precision_states() -> None:
    arguments = problem(40, 200, 36)
    arguments["hidden"] = arguments["hidden"].half()
    leaves = {n: arguments[n].clone().requires_grad_() for n in NAMES}
    wide = {n: arguments[n].double().requires_grad_() for n in NAMES}
    found = ops.token_log_probs(**arguments | leaves, backend="triton")
    expected = ops.token_log_probs(**arguments | wide, backend="reference")
    torch.testing.assert_close(found.log_probs.double(), expected.log_probs, rtol=1e-5, atol=1e-5)
    found.log_probs.sum().backward()
    expected.log_probs.sum().backward()
    for name in NAMES:
        assert leaves[name].grad.dtype == arguments[name].dtype
        eps = torch.finfo(arguments[name].dtype).eps
        torch.testing.assert_close(leaves[name].grad.double(), wide[name].grad, rtol=2 * eps, atol=1e-4)


def test_a_row_depends_on_itself_alone() -> None:
    """Bit for bit: alone, among other rows, and without a reference. Rows keep their place in a tile: numpy's product,
    unlike that of a GPU's matrix unit, depends on it."""
    arguments = with_reference(150, 300)
    whole = ops.token_log_probs(**arguments, backend="triton")
    plain = {n: v for n, v in arguments.items() if n != "reference_head"}
    assert torch.equal(ops.token_log_probs(**plain, backend="triton").log_probs, whole.log_probs)
    for rows in (slice(0, 1), slice(64, 65), slice(64, 150)):
        head = (arguments["reference_head"][0][:, rows], *arguments["reference_head"][1:])
        part = {n: arguments[n][:, rows] for n in ("hidden", "tokens")} | {"reference_head": head}
        for alone, of_all in zip(ops.token_log_probs(**arguments | part, backend="triton"), whole, strict=True):
            assert torch.equal(alone, of_all[:, rows])


@pytest.mark.parametrize("bits", [False, True])
def test_a_reference_of_another_dtype(bits: bool) -> None:
    """Its dtype has no effect on the policy's log-probabilities, to the bit, and its logits are not rounded."""
    arguments = with_reference(70, 300, bits=bits)
    head, temperature = arguments.pop("reference_head"), arguments.pop("temperature")
    arguments = {n: v.half() if v.is_floating_point() else v for n, v in arguments.items()}
    arguments["temperature"] = temperature
    alone = ops.token_log_probs(**arguments, backend="triton")
    found = ops.token_log_probs(**arguments, reference_head=head, backend="triton")
    assert torch.equal(found.log_probs, alone.log_probs) and torch.equal(found.entropy, alone.entropy)
    check(ops.token_log_probs, arguments | {"reference_head": head}, NAMES)


def test_equal_policies_and_impossible_tokens() -> None:
    arguments = problem(20, 300, 36)
    arguments["bias"][:150] = -torch.inf  # a whole tile
    arguments["tokens"] = arguments["tokens"] // 2 + 150
    leaf = arguments["hidden"].clone().requires_grad_()
    head = tuple(arguments[n] for n in NAMES)
    found = ops.token_log_probs(**arguments | {"hidden": leaf}, reference_head=head, backend="triton")
    assert (found.kl == 0).all()
    expected = ops.token_log_probs(**arguments, backend="reference")
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    torch.testing.assert_close(found.entropy, expected.entropy)
    (gradient,) = torch.autograd.grad(found.kl.sum(), leaf, retain_graph=True)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(found.log_probs.sum() + found.entropy.sum(), leaf)
    assert gradient.isfinite().all() and (gradient != 0).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("of", edges.CHECKS)
def test_edges(of: Callable[[str], None]) -> None:
    of("triton")


def loss_arguments(batch: int, grids: tuple[int, ...]) -> dict[str, Any]:
    schedule = ScaleSchedule(grids)
    length = schedule.num_tokens
    logits = noise(batch, length, 5)
    tokens = torch.randint(5, (batch, length), generator=torch.Generator().manual_seed(0))
    now = ops.token_log_probs(logits, None, None, tokens).log_probs
    return {
        "hidden": logits,
        "weight": None,
        "bias": None,
        "tokens": tokens,
        "advantages": noise(batch, seed=1),
        "schedule": schedule,
        "old_log_probs": now + 0.3 * noise(batch, length, seed=2),
        "reference_log_probs": now + 0.3 * noise(batch, length, seed=3),
        "panw_alpha": 0.6,
        "clip_low": 0.1,
        "clip_high": 0.3,
    }


@pytest.mark.parametrize(("i", "level"), enumerate(["token", "scale", "sample"]))
@pytest.mark.parametrize(("j", "normalisation"), enumerate(["per_segment", "per_scale", "none"]))
def test_settings_of_the_loss(i: int, level: str, j: int, normalisation: str) -> None:
    """With soft masks, an untrained scale, and a sample and a scale that are not trained at all."""
    arguments = loss_arguments(3, (1, 2, 3))
    mask = noise(3, 14, seed=5).clamp(0, 1)
    mask[1] = 0
    mask[:, 1:5] = 0
    settings = {"kl_estimator": ("k2", "k3")[(i + j) % 2], "panw_normalisation": normalisation, "ratio_level": level}
    settings |= {"kl_weight": 0.2, "entropy_weight": 0.1}
    check(policy_loss, arguments | settings | {"token_mask": mask}, ("hidden",))
    check(policy_loss, arguments | settings | {"token_mask": mask > 0.1, "first_scale": 2}, ("hidden",))
    totals = torch.tensor([5.0, 3.0, 9.0])
    check(policy_loss, arguments | settings | {"token_mask": mask, "mask_totals": totals}, ("hidden",))


def test_more_samples_and_tokens_than_a_program_takes_at_a_time() -> None:
    check(policy_loss, loss_arguments(40, (1, 2)), ("hidden",))
    check(policy_loss, loss_arguments(1, (1, 24)), ("hidden",))


def test_what_stands_at_untrained_tokens_has_no_effect() -> None:
    arguments = loss_arguments(4, (1, 2, 3))
    mask = torch.arange(56).view(4, 14) % 3 > 0
    arguments |= {"token_mask": mask, "kl_weight": 0.2, "backend": "triton"}
    whole = policy_loss(**arguments)
    spoiled = {n: arguments[n].masked_fill(~mask, torch.nan) for n in ("old_log_probs", "reference_log_probs")}
    for one, other in zip(policy_loss(**arguments | spoiled), whole, strict=True):
        assert torch.equal(one, other)


def test_nothing_to_train() -> None:
    arguments = loss_arguments(3, (1, 2)) | {"token_mask": torch.zeros(3, 5)}
    arguments["hidden"].requires_grad_()
    result = policy_loss(**arguments, backend="triton")
    (gradient,) = torch.autograd.grad(result.loss, arguments["hidden"])
    assert result.loss == 0 and (gradient == 0).all()


def test_on_policy_ratios_are_one() -> None:
    """Log-probabilities of a rollout are those of the loss, to the bit, also beside a reference."""
    arguments = with_reference(14, 300)
    head, temperature = arguments.pop("reference_head"), arguments.pop("temperature")
    now = ops.token_log_probs(**arguments, temperature=temperature, backend="triton").log_probs
    settings = {"advantages": torch.ones(1), "reference_head": head, "kl_estimator": "exact", "kl_weight": 0.1}
    loss = policy_loss(
        **arguments, schedule=ScaleSchedule((1, 2, 3)), old_log_probs=now, temperature=temperature,
        backend="triton", **settings,
    )  # fmt: skip
    assert loss.ratio == 1 and torch.equal(loss.log_probs, now)
