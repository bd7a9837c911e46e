"""policy_loss and group_advantages: hand-computed cases, the definition token by token, and what must not matter."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastvar import ops
from fastvar.ops import PolicyLoss, PolicyLossOptions, group_advantages, token_log_probs
from fastvar.ops.token_log_probs import Head
from fastvar.schedule import ScaleSchedule
from tests.helpers.policy_losses import policy_loss
from tests.helpers.samples import noise

SCHEDULE = ScaleSchedule((1, 2, (2, 3)))
BATCH, LENGTH, WIDTH, SIZE = 6, 11, 4, 7


def rewards_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of three groups of two."""
    return noise(BATCH, dtype=dtype, seed=3)


def problem(dtype: torch.dtype = torch.float64, bits: bool = False) -> dict[str, Any]:
    """Hidden states, head, drawn tokens and advantages of three groups of two."""
    tokens = torch.randint(SIZE, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return {
        "hidden": noise(BATCH, LENGTH, WIDTH, dtype=dtype),
        "weight": noise(SIZE, WIDTH, dtype=dtype, seed=1),
        "bias": noise(SIZE, dtype=dtype, seed=2),
        "tokens": noise(BATCH, LENGTH, SIZE, seed=9) > 0 if bits else tokens,
        "advantages": group_advantages(rewards_of(dtype), 2),
        "schedule": SCHEDULE,
    }


def old_log_probs(arguments: dict[str, Any], spread: float = 0.3) -> torch.Tensor:
    """Log-probabilities of an older policy: some ratios fall outside the clip range."""
    now = token_log_probs(arguments["hidden"], arguments["weight"], arguments["bias"], arguments["tokens"]).log_probs
    return (now + spread * noise(BATCH, LENGTH, dtype=now.dtype, seed=4)).detach()


def reference_head(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return noise(BATCH, LENGTH, 3, dtype=dtype, seed=5), noise(SIZE, 3, dtype=dtype, seed=6), noise(SIZE, dtype=dtype)


def with_gradients(arguments: dict[str, Any], backend: str = "auto") -> tuple[PolicyLoss, list[torch.Tensor]]:
    names = [n for n in ("hidden", "weight", "bias") if arguments[n] is not None]
    leaves = [arguments[n].clone().requires_grad_() for n in names]
    result = policy_loss(**{**arguments, **dict(zip(names, leaves, strict=True))}, backend=backend)
    return result, list(torch.autograd.grad(result.loss, leaves))


def same(a: tuple[PolicyLoss, list[torch.Tensor]], b: tuple[PolicyLoss, list[torch.Tensor]]) -> bool:
    """Bit-equal losses and gradients."""
    return torch.equal(a[0].loss, b[0].loss) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


# Advantages


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    torch.testing.assert_close(group_advantages(rewards, 2), torch.tensor([-1, 1, 0, 0]) / (1 + 1e-4))
    assert torch.equal(group_advantages(rewards, 2, normalise="none"), torch.tensor([-1.0, 1, 0, 0]))
    spread = math.sqrt((2.5**2 + 0.5**2 + 1.5**2 + 1.5**2) / 4)
    expected = torch.tensor([-1, 1, 0, 0]) / (spread + 0.5)
    torch.testing.assert_close(group_advantages(rewards, 2, normalise="batch", spread_floor=0.5), expected)
    torch.testing.assert_close(group_advantages(rewards, 4).square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("normalise", ["group", "batch", "none"])
@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_equal_rewards_have_no_advantage(normalise: str, floor: float) -> None:
    rewards = torch.full((9,), 0.1)  # three times 0.1, divided by 3, is not 0.1
    assert (group_advantages(rewards, 3, normalise=normalise, spread_floor=floor) == 0).all()
    assert group_advantages(torch.zeros(0), 3, normalise=normalise).shape == (0,)
    assert (group_advantages(torch.tensor([2.0, -7.0]), 1, normalise=normalise) == 0).all()


@pytest.mark.parametrize("normalise", ["group", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_missing_rewards_leave_the_others_alone(normalise: str, bad: float) -> None:
    rewards = torch.tensor([1.0, bad, 3.0, 4.0, 0.5, 2.0, bad, bad, bad])
    got = group_advantages(rewards, 3, normalise=normalise)
    assert (got[[1, 6, 7, 8]] == 0).all()
    assert torch.equal(got[[0, 2]], group_advantages(rewards[[0, 2]], 2, normalise=normalise))
    assert torch.equal(got[3:6], group_advantages(rewards[3:6], 3, normalise=normalise))


@pytest.mark.parametrize("normalise", ["group", "batch"])
@pytest.mark.parametrize(
    "rewards",
    [
        (0.0, 1.0, 2.0, -1e20),  # the square of a deviation leaves float32
        (1e25, 2e25, 3e25, 4e25),
        (0.0, 1.0, torch.finfo(torch.float32).min, torch.finfo(torch.float32).min),  # and so does the sum
        (2.0**24, 2.0**24 + 2, 2.0**24 + 4, 2.0**24 + 6),  # float32 rounds the sum
        (1e6, 1e6 + 0.25, 1e6 + 0.5, 1e6 + 0.5625),
    ],
)
def test_advantages_of_large_and_of_nearly_equal_rewards(rewards: tuple[float, ...], normalise: str) -> None:
    got = group_advantages(torch.tensor(rewards), 4, normalise=normalise)
    exact = torch.tensor(rewards, dtype=torch.float64)
    expected = (exact - exact.mean()) / (exact.std(correction=0) + 1e-4)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_advantages_at_the_end_of_float64() -> None:
    rewards = torch.tensor([1e308, -1e308, 1.5e308, -1.5e308], dtype=torch.float64)
    expected = group_advantages(rewards / 2.0**1000, 4, spread_floor=0)
    torch.testing.assert_close(group_advantages(rewards, 4, spread_floor=0), expected, rtol=1e-12, atol=0)


# The loss


def test_by_hand() -> None:
    """Two samples, grids 1 and 1x2, two tokens of probability 1/2 each: all terms in the head."""
    schedule = ScaleSchedule((1, (1, 2)))
    half, third = math.log(1 / 2), math.log(1 / 3)
    result = policy_loss(
        hidden=torch.zeros(2, 3, 2, dtype=torch.float64),
        tokens=torch.tensor([[0, 1, 0], [1, 1, 0]]),
        advantages=group_advantages(torch.tensor([0.0, 2.0], dtype=torch.float64), 2, spread_floor=0.0),
        schedule=schedule,
        # ratios: 1.5 and 1 and 1 for the first sample, 1.5, 1 and 1/2 for the second
        old_log_probs=torch.tensor([[third, half, half], [third, half, 0.0]], dtype=torch.float64),
        reference_log_probs=torch.full((2, 3), third, dtype=torch.float64),
        panw_alpha=1.0,
        kl_weight=0.5,
        kl_estimator="k2",
    )
    # weights 1, 1/2, 1/2; advantages -1 and +1; the second sample's first ratio is held at 1.2
    surrogate = -(1.5 + 0.5 + 0.5) + (1.2 + 0.5 + 0.25)
    kl = (half - third) ** 2 / 2
    assert float(result.loss) == pytest.approx(-surrogate / 4 + 0.5 * kl)
    assert float(result.kl) == pytest.approx(kl)
    assert float(result.clip_fraction) == pytest.approx(1 / 6)
    assert float(result.entropy) == pytest.approx(math.log(2))
    assert float(result.ratio) == pytest.approx((1.5 + 1 + 1 + 1.5 + 1 + 0.5) / 6)
    assert torch.equal(result.log_probs, torch.full((2, 3), half, dtype=torch.float64))
    slope = 0.5 * (half - third)  # of the KL term, times the token's weight
    first = math.hypot(1.5 + slope, slope)
    second = math.hypot(0.5 + slope / 2, 0.5 + slope / 2, -0.5 + slope / 2, -0.25 + slope / 2)
    share = torch.tensor([first, second], dtype=torch.float64)
    torch.testing.assert_close(result.gradient_share, share / share.sum())


def distributions(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, L, 1, V), or of bits (B, L, d, 2): each is a vocabulary of its own."""
    each = torch.stack([torch.zeros_like(logits), logits], -1) if tokens.ndim == 3 else logits[:, :, None]
    return each.log_softmax(-1)


def definition(arguments: dict[str, Any], leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The loss, token by token, the log-probabilities it went through, and by scale mean entropy and ratio (2, K)."""
    a = {
        "old_log_probs": None,
        "reference_log_probs": None,
        "reference_head": None,
        "token_mask": None,
        "first_scale": 0,
        "panw_alpha": 0.0,
        "panw_normalisation": "per_segment",
        "ratio_level": "token",
        "kl_weight": 0.0,
        "kl_estimator": "k3",
        "entropy_weight": 0.0,
        "temperature": 1.0,
        **arguments,
        **leaves,
    }
    logits = F.linear(a["hidden"], a["weight"], a["bias"]) / a["temperature"]
    logs = distributions(logits, a["tokens"])
    drawn = a["tokens"].long().view(*logs.shape[:3], 1)
    l = logs.gather(-1, drawn).sum((2, 3))  # noqa: E741
    l.retain_grad()
    old = l.detach() if a["old_log_probs"] is None else a["old_log_probs"]
    gain = a["advantages"]
    scale_of = SCHEDULE.scale_of_token
    mask = torch.ones(BATCH, LENGTH, dtype=l.dtype) if a["token_mask"] is None else a["token_mask"].to(l.dtype)
    mask = mask * (torch.tensor(scale_of) >= a["first_scale"])
    numerator, scales = torch.zeros(len(SCHEDULE), dtype=l.dtype), torch.zeros(len(SCHEDULE), dtype=l.dtype)
    measured = torch.zeros(2, len(SCHEDULE), dtype=l.dtype)
    for b, i in itertools.product(range(BATCH), range(LENGTH)):
        m = mask[b, i]
        if m == 0:
            continue
        level = a["ratio_level"]
        near = [j for j in range(LENGTH) if level == "sample" or (scale_of[j] == scale_of[i])]
        near = [i] if level == "token" else near
        ratio = (sum(mask[b, j] * (l[b, j] - old[b, j]) for j in near) / sum(mask[b, j] for j in near)).exp()
        s = torch.minimum(ratio * gain[b], ratio.clamp(0.8, 1.2) * gain[b])
        if a["kl_weight"] and a["kl_estimator"] == "exact":
            other = distributions(F.linear(*a["reference_head"]) / a["temperature"], a["tokens"])[b, i]
            s = s - a["kl_weight"] * (logs[b, i].exp() * (logs[b, i] - other)).sum()
        elif a["kl_weight"]:
            g = a["reference_log_probs"][b, i] - l[b, i]
            s = s - a["kl_weight"] * (g**2 / 2 if a["kl_estimator"] == "k2" else g.exp() - g - 1)
        entropy = -(logs[b, i].exp() * logs[b, i]).sum()
        s = s + a["entropy_weight"] * entropy
        k = scale_of[i]
        measured[:, k] += m * torch.stack([entropy, ratio]).detach()
        numerator = numerator + m * s * F.one_hot(torch.tensor(k), len(SCHEDULE))
        scales[k] += m
    means_by_scale = torch.where(scales > 0, measured / scales, 0)
    weights = torch.tensor([float(h * w) ** -a["panw_alpha"] for h, w in SCHEDULE], dtype=l.dtype)
    if a["panw_normalisation"] == "per_scale":
        present = scales > 0
        means = numerator[present] / scales[present]
        return -(weights[present] * means).sum() / weights[present].sum(), l, means_by_scale
    total = (weights * scales).sum() if a["panw_normalisation"] == "per_segment" else scales.sum()
    return -(weights * numerator).sum() / total, l, means_by_scale


@pytest.mark.parametrize("ratio_level", ["token", "scale", "sample"])
@pytest.mark.parametrize("kl_estimator", ["exact", "k2", "k3"])
@pytest.mark.parametrize(
    ("panw_normalisation", "bits"),
    [("per_segment", False), ("per_scale", False), ("none", False), ("per_segment", True)],
)
def test_equals_the_definition(ratio_level: str, kl_estimator: str, panw_normalisation: str, bits: bool) -> None:
    """Loss, gradients and gradient share are autograd's, with a soft mask and an untrained scale; the reference's too,
    which is a specification of its own."""
    arguments = problem(bits=bits)
    mask = noise(BATCH, LENGTH, dtype=torch.float64, seed=8).clamp(0, 1)
    arguments |= {
        "old_log_probs": old_log_probs(arguments),
        "token_mask": mask,
        "first_scale": 1,
        "ratio_level": ratio_level,
        "kl_estimator": kl_estimator,
        "kl_weight": 0.3,
        "panw_alpha": 0.6,
        "panw_normalisation": panw_normalisation,
        "entropy_weight": 0.05,
        "temperature": 0.7,
    }
    if kl_estimator == "exact":
        arguments["reference_head"] = reference_head()
    else:
        arguments["reference_log_probs"] = old_log_probs(arguments, 0.7)
    leaves = {n: arguments[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    expected, through, by_scale = definition(arguments, leaves)
    expected.backward()
    assert through.grad is not None
    norms = torch.stack([part.norm() for part in through.grad.split(SCHEDULE.lengths, 1)])
    for backend in ("torch", "reference"):
        got, gradients = with_gradients(arguments, backend)
        torch.testing.assert_close(got.loss, expected.detach(), rtol=1e-10, atol=1e-12)
        for gradient, leaf in zip(gradients, leaves.values(), strict=True):
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12)
        assert 0 < float(got.clip_fraction) < 1
        torch.testing.assert_close(got.gradient_share, norms / norms.sum(), rtol=1e-9, atol=1e-12)
        assert got.gradient_share[0] == 0
        found = torch.stack([got.scale_entropy, got.scale_ratio])
        torch.testing.assert_close(found, by_scale, rtol=1e-9, atol=1e-12)


def test_the_reference_is_no_implementation() -> None:
    """What all are compared with has nothing of theirs but the check of the tokens."""
    folder = Path(ops.__file__).parents[2] / "kernels/token_log_probs"
    shared = "fastvar.kernels.token_log_probs"
    for path in folder.glob("*.py"):
        lines = [line.split(" import ") for line in path.read_text().splitlines() if f"from {shared}" in line]
        if path.stem == "reference":
            assert lines == [[f"from {shared}", "checks"]]
        assert not any("reference" in part for line in lines for part in line)


@pytest.mark.parametrize("level", ["token", "scale", "sample"])
def test_on_policy_ratio_is_one_and_keeps_its_gradient(level: str) -> None:
    arguments = problem() | {"ratio_level": level}
    now = token_log_probs(arguments["hidden"], arguments["weight"], arguments["bias"], arguments["tokens"]).log_probs
    free, given = with_gradients(arguments), with_gradients(arguments | {"old_log_probs": now})
    assert same(free, given)
    assert free[0].ratio == 1 and free[0].clip_fraction == 0
    assert any((g != 0).any() for g in free[1])
    leaves = [arguments[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    log_probs = token_log_probs(*leaves, arguments["tokens"]).log_probs
    plain = -(arguments["advantages"][:, None] * log_probs).mean()
    for got, expected in zip(free[1], torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neutral_settings_are_bit_equal(bits: bool, dtype: torch.dtype) -> None:
    plain = problem(dtype, bits)
    plain["old_log_probs"] = old_log_probs(plain)
    base = with_gradients(plain)
    gain = plain["advantages"][:, None]
    ratio = (base[0].log_probs - plain["old_log_probs"]).exp()
    mean = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
    assert torch.equal(base[0].loss.detach(), -mean)
    ones = torch.ones(BATCH, LENGTH)
    for change in [
        {"token_mask": ones},
        {"token_mask": ones.bool()},
        {"panw_alpha": 0.0, "panw_normalisation": "none"},
        {"reference_log_probs": ones * math.nan, "kl_weight": 0.0},
        {"reference_head": reference_head(dtype), "kl_weight": 0.0, "kl_estimator": "exact"},
    ]:
        assert same(base, with_gradients(plain | change))


def test_a_head_is_a_record_or_a_tuple_or_logits() -> None:
    """And the options are those of the record."""
    arguments = problem()
    head = tuple(arguments.pop(name) for name in ("hidden", "weight", "bias"))
    options = PolicyLossOptions(panw_alpha=0.3)
    found = ops.policy_loss(head, **arguments, options=options)
    for other in (Head(*head), F.linear(*head)):
        torch.testing.assert_close(ops.policy_loss(other, **arguments, options=options).loss, found.loss)
    assert not torch.equal(found.loss, ops.policy_loss(head, **arguments).loss)
    for unfit, got in (({"panw_alpha": 0.3}, "dict"), (None, "NoneType"), (PolicyLossOptions, "type")):
        with pytest.raises(ValueError, match=f"policy_loss: options: expected PolicyLossOptions, got {got}"):
            ops.policy_loss(head, **arguments, options=unfit)  # type: ignore[arg-type]
    for wrong, got in ((head[:2], "2 items"), ([1], "list"), ((None, None, None), "None")):
        with pytest.raises(ValueError, match=f"policy_loss: head: expected .*, got {got}"):
            ops.policy_loss(wrong, **arguments)  # type: ignore[arg-type]


def test_logits_and_bits_give_the_same_loss_as_hidden_states() -> None:
    for bits in (False, True):
        arguments = problem(bits=bits) | {"panw_alpha": 0.6}
        logits = F.linear(arguments["hidden"], arguments["weight"], arguments["bias"])
        got = policy_loss(**arguments | {"hidden": logits, "weight": None, "bias": None})
        torch.testing.assert_close(got.loss, policy_loss(**arguments).loss)


@pytest.mark.parametrize("normalisation", ["per_segment", "per_scale", "none"])
@pytest.mark.parametrize("level", ["token", "scale", "sample"])
def test_nothing_to_train_is_zero(normalisation: str, level: str) -> None:
    arguments = problem() | {"token_mask": torch.zeros(BATCH, LENGTH), "ratio_level": level}
    arguments |= {"panw_normalisation": normalisation, "kl_weight": 1.0, "entropy_weight": 1.0}
    arguments |= {"reference_log_probs": old_log_probs(arguments), "old_log_probs": old_log_probs(arguments)}
    result, gradients = with_gradients(arguments)
    assert all((value == 0).all() for value in (*result[:4], result.ratio, result.gradient_share, *gradients))


def test_constant_reward_gives_exactly_no_gradient() -> None:
    advantages = group_advantages(torch.full((BATCH,), 0.1, dtype=torch.float64), 2)
    arguments = problem() | {"advantages": advantages, "panw_alpha": 0.6}
    result, gradients = with_gradients(arguments)
    assert result.loss == 0
    assert all((g == 0).all() for g in gradients)


def test_missing_reward_trains_nothing_of_its_row() -> None:
    rewards = rewards_of()
    rewards[3] = math.nan
    arguments = problem() | {"advantages": group_advantages(rewards, 2)}
    result, (hidden, *_) = with_gradients(arguments)
    assert torch.isfinite(result.loss)
    assert (hidden[3] == 0).all() and (hidden[2] == 0).all()  # its group of two has no spread left
    assert (hidden[[0, 1, 4, 5]] != 0).any(-1).all()
    complete = with_gradients(problem())[1][0]
    assert torch.equal(hidden[[0, 1, 4, 5]], complete[[0, 1, 4, 5]])


def test_untrained_tokens_have_no_effect() -> None:
    """Neither what stands there (NaN included) nor their gradient."""
    mask = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3 > 0
    arguments = problem() | {"token_mask": mask, "first_scale": 1, "kl_weight": 0.2, "panw_alpha": 0.6}
    arguments |= {"old_log_probs": old_log_probs(arguments), "reference_log_probs": old_log_probs(arguments, 0.5)}
    trained = mask & (torch.tensor(SCHEDULE.scale_of_token) >= 1)
    base = with_gradients(arguments)
    spoiled = {n: arguments[n].masked_fill(~trained, math.nan) for n in ("old_log_probs", "reference_log_probs")}
    assert same(base, with_gradients(arguments | spoiled))
    hidden = base[1][0]
    assert (hidden[~trained] == 0).all()
    assert (hidden[trained] != 0).any(-1).any()


@pytest.mark.parametrize(
    ("advantage", "ratio", "held"), [(1.0, 1.25, True), (1.0, 0.5, False), (-1.0, 0.65, True), (-1.0, 2.0, False)]
)
def test_clip_directions(advantage: float, ratio: float, held: bool) -> None:
    """A ratio is held only where going on would pay: above 1 + 0.2 for good tokens, below 1 - 0.3 for bad ones."""
    hidden = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
    result = policy_loss(
        hidden=hidden,
        tokens=torch.zeros(1, 1, dtype=torch.int64),
        schedule=ScaleSchedule((1,)),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        old_log_probs=torch.full((1, 1), math.log(0.25 / ratio), dtype=torch.float64),
        clip_low=0.3,
        clip_high=0.2,
    )
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    assert float(result.clip_fraction) == held
    assert bool((gradient == 0).all()) == held
    held_at = 1.2 if advantage > 0 else 0.7
    assert float(result.loss.detach()) == pytest.approx(-advantage * (held_at if held else ratio))


def test_clip_can_be_off() -> None:
    arguments = problem()
    arguments["old_log_probs"] = old_log_probs(arguments, 2.0)
    result = policy_loss(**arguments, clip_low=math.inf, clip_high=math.inf)
    gain = arguments["advantages"][:, None]
    torch.testing.assert_close(result.loss, -((result.log_probs - arguments["old_log_probs"]).exp() * gain).mean())
    assert result.clip_fraction == 0


def test_expected_gradients_of_the_kl_estimators() -> None:
    """Over tokens drawn from the policy, k2's gradient is the exact KL's and k3's is not; k3's value is unbiased."""
    logits, other = noise(1, 1, 5, dtype=torch.float64), noise(1, 1, 5, dtype=torch.float64, seed=1)
    probs = logits.softmax(-1)[0, 0]
    values, gradients = {}, {}
    for estimator in ("exact", "k2", "k3"):
        value, gradient = 0.0, torch.zeros_like(logits)
        for token in range(5):
            leaf = logits.clone().requires_grad_()
            picked = torch.tensor([[token]])
            reference: dict[str, Any] = {"reference_log_probs": token_log_probs(other, None, None, picked).log_probs}
            if estimator == "exact":
                reference = {"reference_head": (other, None, None)}
            result = policy_loss(
                hidden=leaf,
                tokens=picked,
                schedule=ScaleSchedule((1,)),
                advantages=torch.zeros(1),
                kl_weight=1.0,
                kl_estimator=estimator,
                **reference,
            )
            value += float(probs[token] * result.kl)
            gradient += probs[token] * torch.autograd.grad(result.loss, leaf)[0]
        values[estimator], gradients[estimator] = value, gradient
    assert values["k3"] == pytest.approx(values["exact"])
    torch.testing.assert_close(gradients["k2"], gradients["exact"])
    assert not torch.allclose(gradients["k3"], gradients["exact"], rtol=1e-2)


def test_panw_balances_the_scales() -> None:
    """On the grids of VAR 256: without weights the fine scales have the gradient, with 1/2 all share it."""
    schedule = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    logits, tokens = torch.zeros(4, 680, 3), torch.zeros(4, 680, dtype=torch.int64)
    given = {"hidden": logits, "tokens": tokens, "schedule": schedule}
    given["advantages"] = torch.tensor([1.0, -1.0, 2.0, -2.0])

    def spread(alpha: float, normalisation: str = "per_segment") -> float:
        share = policy_loss(**given, panw_alpha=alpha, panw_normalisation=normalisation).gradient_share
        torch.testing.assert_close(share.sum(), torch.tensor(1.0))
        return float(share.max() / share.min())

    assert spread(0.0) == pytest.approx(16, rel=1e-4)  # sqrt(256)
    assert spread(0.5) == pytest.approx(1, rel=1e-4)
    assert spread(0.6) < spread(0.0) / 4
    assert spread(1.0) == pytest.approx(16, rel=1e-4)
    assert spread(0.5, "none") == pytest.approx(1, rel=1e-4)


def test_coarse_segment_is_a_truncated_schedule() -> None:
    """The fine and coarse terms of one rollout: with first_scale, and with the first tokens alone."""
    arguments = problem()
    coarse, length = SCHEDULE.truncated(2), SCHEDULE.ends[1]
    mask = (torch.arange(LENGTH) < length).expand(BATCH, -1)
    part = {n: arguments[n][:, :length] for n in ("hidden", "tokens")}
    got = policy_loss(**arguments | part | {"schedule": coarse})
    torch.testing.assert_close(got.loss, policy_loss(**arguments, token_mask=mask).loss)
    fine = policy_loss(**arguments, first_scale=2)
    torch.testing.assert_close(fine.loss, policy_loss(**arguments, token_mask=~mask).loss)


@pytest.mark.parametrize("normalisation", ["per_segment", "per_scale", "none"])
def test_parts_of_a_batch_add_up(normalisation: str) -> None:
    """Masks that differ between the parts, one of which trains nothing."""
    arguments = problem() | {"panw_alpha": 0.6, "panw_normalisation": normalisation}
    mask = (noise(BATCH, LENGTH, seed=7) > 0).double()
    mask[4:] = 0
    rows = {
        "advantages": arguments["advantages"],
        "token_mask": mask,
        "old_log_probs": old_log_probs(arguments),
    }
    totals = torch.stack([part.sum() for part in mask.split(SCHEDULE.lengths, 1)])
    whole, gradients = with_gradients({**arguments, **rows, "first_scale": 1})
    parts = []
    for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
        own = {name: value[part] for name, value in {**rows, **{n: arguments[n] for n in ("hidden", "tokens")}}.items()}
        parts.append(with_gradients({**arguments, **own, "first_scale": 1, "mask_totals": totals}))
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([g[0] for _, g in parts]), gradients[0])
    for i in (1, 2):
        torch.testing.assert_close(sum(g[i] for _, g in parts), gradients[i])


def test_results_are_detached_but_for_the_loss() -> None:
    arguments = problem()
    arguments["hidden"].requires_grad_()
    loss, *rest = policy_loss(**arguments)
    assert loss.requires_grad and loss.shape == ()
    assert not any(value.requires_grad for value in rest)


def test_autocast_and_low_precision() -> None:
    arguments = problem(torch.float32)
    rounded = arguments | {n: arguments[n].bfloat16() for n in ("hidden", "weight", "bias")}
    with torch.autocast("cpu", torch.bfloat16):
        inside = policy_loss(**arguments)
    assert inside.loss.dtype == torch.float32
    assert torch.equal(inside.loss, policy_loss(**rounded).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": (1, 2)}, "schedule: expected a ScaleSchedule"),
        ({"schedule": ScaleSchedule((1, 2))}, r"hidden: expected shape \(B, 5, E\)"),
        ({"weight": torch.zeros(SIZE, 9)}, "weight: expected shape"),
        ({"advantages": torch.zeros(3)}, "advantages: expected shape"),
        ({"advantages": torch.zeros(BATCH).long()}, "advantages: expected a floating-point tensor"),
        ({"panw_normalisation": "l2"}, "panw_normalisation: expected one of"),
        ({"panw_alpha": -0.5}, "panw_alpha: expected at least 0"),
        ({"ratio_level": "word"}, "ratio_level: expected one of"),
        ({"kl_estimator": "k1"}, "kl_estimator: expected one of"),
        ({"kl_weight": 0.1}, "reference_log_probs: expected a tensor, as kl_weight is 0.1"),
        ({"kl_weight": 0.1, "kl_estimator": "exact"}, "reference_head: expected"),
        ({"reference_head": (None, None, None)}, "reference_head: expected None"),
        (
            {"kl_estimator": "exact", "reference_log_probs": torch.zeros(BATCH, LENGTH)},
            "reference_log_probs: expected None",
        ),
        ({"old_log_probs": torch.zeros(BATCH, 3)}, "old_log_probs: expected shape"),
        ({"old_log_probs": torch.zeros(BATCH, LENGTH).long()}, "old_log_probs: expected a floating-point"),
        ({"token_mask": torch.zeros(BATCH, 3)}, "token_mask: expected shape"),
        ({"token_mask": torch.zeros(BATCH, LENGTH).long()}, "token_mask: expected"),
        ({"first_scale": 3}, "first_scale: expected a scale from 0 to 2"),
        ({"clip_low": -0.1}, "clip_low: expected at least 0"),
        ({"clip_high": math.nan}, "clip_high: expected at least 0"),
        ({"panw_alpha": math.inf}, "panw_alpha: expected at least 0 and finite, got inf"),
        ({"entropy_weight": math.nan}, "entropy_weight: expected a number, got nan"),
        ({"temperature": 0.0}, "temperature: expected 1e-12 to 1e"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"policy_loss: {message}"):
        policy_loss(**problem() | change)


def test_wrong_arguments_of_group_advantages() -> None:
    with pytest.raises(ValueError, match="group_advantages: group_size: expected a number that divides the batch 4"):
        group_advantages(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="group_advantages: rewards: expected a floating-point tensor"):
        group_advantages(torch.zeros(4).long(), 2)
    with pytest.raises(ValueError, match="group_advantages: rewards: expected shape"):
        group_advantages(torch.zeros(4, 1), 2)
    with pytest.raises(ValueError, match="group_advantages: normalise: expected one of"):
        group_advantages(torch.zeros(4), 2, normalise="z")
    with pytest.raises(ValueError, match="group_advantages: spread_floor: expected at least 0"):
        group_advantages(torch.zeros(4), 2, spread_floor=-1.0)
