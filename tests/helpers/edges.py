"""What log-probabilities, the losses made of them and drawn bits owe at the edges of float32, for any backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvar.ops import cross_entropy, sample_bits, token_log_probs
from fastvar.schedule import ScaleSchedule
from tests.helpers.policy_losses import policy_loss
from tests.helpers.samples import noise

INF = math.inf


def _multiples(*shape: int, seed: int) -> torch.Tensor:
    """Multiples of 1/4 up to 3/4: sums of a few of their products are exact, whatever their order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)) / 4


def _results(
    function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...], backend: str
) -> list[torch.Tensor]:
    """All results and the gradients of the sum of those that carry one."""
    leaves = {n: arguments[n].clone().requires_grad_() for n in names}
    found = [r for r in function(**arguments | leaves, backend=backend) if isinstance(r, torch.Tensor)]
    total = sum(r.sum() for r in found if r.requires_grad)
    return [*(r.detach() for r in found), *torch.autograd.grad(total, list(leaves.values()))]


def common_offset(backend: str) -> None:
    """It changes no bit of any result or gradient where the sums with it are exact."""
    schedule = ScaleSchedule((1, 2, 3))
    shape, size = (2, 14), 300 if backend == "triton" else 1100  # several tiles
    hidden, weight, bias = _multiples(*shape, 8, seed=0), _multiples(size, 8, seed=1), _multiples(size, seed=2)
    logits, other = hidden @ weight.T + bias, _multiples(*shape, size, seed=3)
    tokens = torch.randint(size, shape, generator=torch.Generator().manual_seed(4))
    loss = {
        "advantages": torch.tensor([1.0, -1.0]),
        "schedule": schedule,
        "old_log_probs": -7 + noise(*shape) / 4,
        "kl_estimator": "exact",
        "kl_weight": 0.3,
        "entropy_weight": 0.1,
    }
    for function, settings in ((token_log_probs, {}), (cross_entropy, {"label_smoothing": 0.1}), (policy_loss, loss)):
        found = []
        for offset in (0.0, 1e3, -1e5):
            reference = {} if function is cross_entropy else {"reference_head": (other - 3 * offset / 4, None, None)}
            rest = {"tokens": tokens, **settings, **reference}
            given = {"hidden": logits + offset, "weight": None, "bias": None, **rest}
            product = {"hidden": hidden, "weight": weight, "bias": bias + offset, **rest}
            found.append(_results(function, given, ("hidden",), backend))
            found[-1] += _results(function, product, ("hidden", "weight", "bias"), backend)
        for results in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


def infinite_logits(backend: str) -> None:
    """Minus infinity is probability 0 without a gradient; rows without a softmax are NaN, and only they."""
    size, finite = 1100, slice(1030, 1090)  # a tile of nothing but minus infinity, and an end of it
    logits, other = (torch.full((1, 6, size), -INF) for _ in range(2))
    logits[..., finite], other[..., finite] = noise(1, 6, 60), noise(1, 6, 60, seed=1)
    logits[0, 1], logits[0, 2, 1033], logits[0, 3, 1033] = -INF, INF, math.nan
    tokens = torch.arange(1050, 1056)[None]
    tokens[0, 4] = 3
    arguments = {"hidden": logits, "weight": None, "bias": None, "tokens": tokens}
    *found, gradient = _results(
        token_log_probs, arguments | {"reference_head": (other, None, None)}, ("hidden",), backend
    )
    for values in found:
        assert values[0].isnan().tolist() == [False, True, True, True, False, False]
    assert gradient[0, 1:4].isnan().all()
    assert found[0][0, 4] == -INF and gradient[0, 4, 3] == 1  # the token is impossible
    gradient[0, 4, 3] = 0
    right = [0, 4, 5]
    assert (gradient[0, right, : finite.start] == 0).all() and (gradient[0, right, finite.stop :] == 0).all()
    alone = {"hidden": logits[..., finite].double(), "weight": None, "bias": None, "tokens": (tokens - 1030).clamp(0)}
    alone["reference_head"] = (other[..., finite].double(), None, None)
    *expected, own_gradient = _results(token_log_probs, alone, ("hidden",), "reference")
    for values, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(values[0, [0, 5]], wanted[0, [0, 5]].float(), rtol=1e-5, atol=1e-5)
    rows = gradient[0, [0, 5]][:, finite]
    torch.testing.assert_close(rows, own_gradient[0, [0, 5]].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][0, 4], expected[1][0, 4].float(), rtol=1e-5, atol=1e-5)
    other[0, 0, 1040] = -INF  # what the policy finds possible
    found = token_log_probs(**arguments, reference_head=(other, None, None), backend=backend)
    assert found.kl is not None and 1e25 < found.kl[0, 0] < INF
    on_policy = {"advantages": torch.ones(1), "schedule": ScaleSchedule(((2, 3),))}
    for function, settings in (
        (policy_loss, on_policy),
        (cross_entropy, {}),
        (cross_entropy, {"label_smoothing": 0.3}),
    ):
        *_, gradient = _results(function, arguments | settings, ("hidden",), backend)
        assert gradient[0, 1:4].isnan().all()
        assert (gradient[0, 4, 3] != 0) and (gradient[0, [0, 5], : finite.start] == 0).all()
        wide = arguments | {"hidden": logits.double()}
        *_, expected_gradient = _results(function, wide | settings, ("hidden",), "reference")
        torch.testing.assert_close(gradient[0, right], expected_gradient[0, right].float(), rtol=1e-5, atol=1e-6)


def untrained_tokens(backend: str) -> None:
    """NaN and infinities there change no bit of the loss or of any gradient."""
    schedule = ScaleSchedule((1, 2, 3))
    mask = torch.arange(42).view(3, 14) % 3 > 0
    gains = {"advantages": torch.tensor([1.0, -1.0, 2.0]), "schedule": schedule, "token_mask": mask}
    measured = {"kl_weight": 0.2, "kl_estimator": "exact", "entropy_weight": 0.1, "first_scale": 1}
    bad = torch.tensor([math.nan, INF, -INF])[torch.arange(42) % 9 // 3].view(3, 14, 1)
    untrained = ~(mask & (torch.tensor(schedule.scale_of_token) >= 1))[..., None]
    for dtype in (torch.float32, torch.float16):
        hidden, other = noise(3, 14, 5, dtype=dtype), noise(3, 14, 5, dtype=dtype, seed=1)
        weight, bias = noise(7, 5, dtype=dtype, seed=2), noise(7, dtype=dtype, seed=3)
        tokens, bits = torch.arange(42).view(3, 14) % 5, noise(3, 14, 7) > 0
        for head, picked in (((weight, bias), tokens), ((weight, bias), bits), ((None, None), tokens)):
            names = ("hidden",) if head[0] is None else ("hidden", "weight", "bias")

            def arguments(hidden: torch.Tensor, other: torch.Tensor, head: Any = head, picked: Any = picked) -> Any:
                return {"hidden": hidden, "weight": head[0], "bias": head[1], "tokens": picked}, (other, *head)

            def loss(hidden: torch.Tensor, other: torch.Tensor, names: Any = names, made: Any = arguments) -> Any:
                own, reference = made(hidden, other)
                settings = {**gains, **measured, "reference_head": reference}
                found = _results(policy_loss, own | settings, names, backend)
                return found[:4] + found[5:]  # all but the log-probabilities of all tokens

            spoiled = [torch.where(untrained, bad.to(dtype), t) for t in (hidden, other)]
            assert all(torch.equal(a, b) for a, b in zip(loss(*spoiled), loss(hidden, other), strict=True))
            weights = (~untrained[..., 0]).float()

            def smoothed(hidden: torch.Tensor, names: Any = names, made: Any = arguments, w: Any = weights) -> Any:
                leaves = made(hidden, hidden)[0] | {"label_smoothing": 0.1, "weights": w}
                found = _results(cross_entropy, leaves, names, backend)
                return found[:1] + found[3:]

            assert all(torch.equal(a, b) for a, b in zip(smoothed(spoiled[0]), smoothed(hidden), strict=True))


def trained_tokens(backend: str) -> None:
    """NaN at one of them shows in the loss, whatever the sign of the advantage."""
    for advantage in (1.0, -1.0):
        hidden, weight = noise(2, 5, 4), noise(7, 4, seed=1)
        hidden[1, 3] = math.nan
        given = {"hidden": hidden, "weight": weight, "bias": None, "tokens": torch.arange(10).view(2, 5) % 7}
        settings = {"advantages": torch.full((2,), advantage), "schedule": ScaleSchedule((1, 2))}
        old = -2 + noise(2, 5, seed=2) / 4
        assert policy_loss(**given, **settings, old_log_probs=old, backend=backend).loss.isnan()


def nothing_times_infinity(backend: str) -> None:
    """Beside ratios that overflow an advantage of 0 is nothing, and so is one of NaN where nothing is trained."""
    logits, tokens = noise(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64)
    given = {"hidden": logits, "weight": None, "bias": None, "tokens": tokens, "schedule": ScaleSchedule((1, 2))}
    drifted = token_log_probs(logits, None, None, tokens).log_probs
    drifted[0] -= 100  # e^100 is past float32
    mask = torch.ones(2, 5)
    mask[0] = 0
    for level in ("token", "scale", "sample"):
        settings = {"old_log_probs": drifted, "ratio_level": level, "clip_high": INF}
        for gain, trained, expected in ((0.0, None, -0.5), (math.nan, mask, -1.0), (INF, mask, -1.0)):
            loss = settings | {"advantages": torch.tensor([gain, 1.0]), "token_mask": trained}
            found = _results(policy_loss, given | loss, ("hidden",), backend)
            assert float(found[0]) == pytest.approx(expected) and found[-1].isfinite().all()
            assert (found[-1][0] == 0).all() and (found[-1][1] != 0).any()


def certain_bits(backend: str) -> None:
    """Infinite logits: log-probability 0 and minus infinity, no entropy and no NaN."""
    logits = torch.tensor([[[INF, -INF, 0.5], [INF, -INF, 0.5], [0.5, 0.5, 0.5]]])
    bits = torch.tensor([[[1, 0, 1], [0, 0, 1], [1, 1, 1]]])
    likely, fair = math.log1p(math.exp(-0.5)), 1 / (1 + math.exp(-0.5))
    entropy = likely + 0.5 * (1 - fair)
    given = {"hidden": logits, "weight": None, "bias": None}
    product = {"hidden": torch.zeros(1, 3, 2), "weight": torch.zeros(3, 2), "bias": logits[0, 0]}
    product["tokens"] = bits[:, :2].repeat(1, 2, 1)[:, :3]
    for arguments in (given | {"tokens": bits}, product):
        found = token_log_probs(**arguments, reference_head=tuple(arguments.values())[:3], backend=backend)
        assert found.kl is not None and (found.kl == 0).all()
        expected = torch.tensor([[-likely, -INF]])
        torch.testing.assert_close(found.log_probs[:, :2], expected)
        torch.testing.assert_close(found.entropy[:, :2], torch.full((1, 2), entropy))
    *_, gradient = _results(
        token_log_probs, given | {"tokens": bits, "reference_head": (logits, None, None)}, ("hidden",), backend
    )
    slope = 1 - fair - 0.5 * fair * (1 - fair)  # of the log-probability and the entropy of the uncertain bit
    torch.testing.assert_close(gradient[0, :2], torch.tensor([[0, 0, slope], [-1, 0, slope]]))
    for own, other, kl in (
        (logits[:, :1], 0.5, 2 * math.log1p(math.exp(0.5)) - 0.5),  # infinity against 0.5, minus infinity too
        (logits[:, 2:], logits[:, :1], None),  # as good as infinite
        (logits[:, :1], -logits[:, :1], None),
    ):
        reference = torch.full_like(own, other) if isinstance(other, float) else other
        arguments = {"hidden": own, "weight": None, "bias": None, "tokens": bits[:, :1]}
        head = {"reference_head": (reference, None, None)}
        *found, gradient = _results(token_log_probs, arguments | head, ("hidden",), backend)
        if kl is None:
            assert 1e25 < float(found[2]) < INF
        else:
            torch.testing.assert_close(found[2], torch.tensor([[kl]]))
        assert gradient.isfinite().all()
    smoothed = _results(cross_entropy, given | {"tokens": bits, "label_smoothing": 0.1}, ("hidden",), backend)
    assert not any(values.isnan().any() for values in smoothed)
    # each bit's: (1 - 0.1) times the gradient of its own log-probability, beside 0.1 (2 s - 1) / 2 of what is uncertain
    slope = -0.9 * (1 - fair) + 0.1 * (2 * fair - 1) / 2
    torch.testing.assert_close(3 * smoothed[-1][0, :2], torch.tensor([[0, 0, slope], [0.9, 0, slope]]))
    loss = {"advantages": torch.tensor([1.0]), "schedule": ScaleSchedule(((1, 3),)), "tokens": bits}
    loss |= {"token_mask": torch.tensor([[True, False, True]]), "entropy_weight": 0.1, "kl_weight": 0.1}
    loss |= {"kl_estimator": "exact", "reference_head": (logits, None, None)}
    found = _results(policy_loss, given | loss, ("hidden",), backend)
    assert not any(values.isnan().any() for values in found) and found[0].isfinite()


def certain_bits_are_drawn(backend: str) -> None:
    """With and without guidance, which takes infinite logits of one sign for equal."""
    logits = torch.tensor([INF, -INF, INF, -INF, 0.0, 1.0]).expand(9, 20, 6)
    others = torch.tensor([INF, -INF, 1.0, 1.0, -INF, INF]).expand(9, 20, 6)
    for settings in ({}, {"top_p": 0.9}, {"top_k": 1}):
        given = {"logits": logits, "seeds": torch.arange(9), "log_probs": True, "backend": backend}
        found = sample_bits(**given, **settings)
        assert found.log_probs is not None and found.sampled_log_probs is not None
        assert (found.bits[..., :4] == torch.tensor([True, False, True, False])).all()
        assert found.log_probs.isfinite().all() and found.sampled_log_probs.isfinite().all()
        certain = sample_bits(**given | {"logits": logits[..., :4]}, **settings)
        assert all((scores == 0).all() for scores in certain[1:])
        found = sample_bits(**given, unconditional=others, guidance=1.5, temperature=0.7, **settings)
        assert (found.bits == torch.tensor([True, False, True, False, True, False])).all()
        assert found.sampled_log_probs is not None and (found.sampled_log_probs.abs() < 1e-30).all()
        assert found.log_probs is not None and found.log_probs.isfinite().all()
    against = sample_bits(torch.full((1, 1, 1), INF), unconditional=torch.full((1, 1, 1), -INF), guidance=-0.9,
                          seeds=torch.arange(1), log_probs=True, backend=backend)  # fmt: skip
    assert not against.bits.any() and against.log_probs == -INF


def no_tokens(backend: str) -> None:
    """Forward and backward."""
    schedule = ScaleSchedule((1, 2))
    loss = {"advantages": torch.zeros(0), "schedule": schedule, "entropy_weight": 0.1}
    for batch, length in ((0, 5), (2, 0)):
        hidden, weight, bias = torch.zeros(batch, length, 4), noise(6, 4), noise(6)
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        for picked in (tokens, torch.zeros(batch, length, 6, dtype=torch.bool)):
            head = {"hidden": hidden, "weight": weight, "bias": bias, "tokens": picked}
            given = {"hidden": torch.zeros(batch, length, 6), "weight": None, "bias": None, "tokens": picked}
            for arguments, names in ((head, ("hidden", "weight", "bias")), (given, ("hidden",))):
                reference = {"reference_head": tuple(arguments[n] for n in ("hidden", "weight", "bias"))}
                calls: list[tuple[Any, dict[str, Any]]] = [(token_log_probs, reference), (cross_entropy, {})]
                calls.append((cross_entropy, {"label_smoothing": 0.1, "weights": torch.ones(length)}))
                calls += [(policy_loss, loss)] if batch == 0 else []
                for function, settings in calls:
                    for values in _results(function, arguments | settings, names, backend):
                        assert values.numel() == 0 or (values == 0).all()


def no_vocabulary(backend: str) -> None:
    hidden, tokens = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    bits = torch.zeros(2, 5, 0, dtype=torch.bool)
    loss = {"advantages": torch.zeros(2), "schedule": ScaleSchedule((1, 2))}
    for function, settings in ((token_log_probs, {}), (cross_entropy, {}), (policy_loss, loss)):
        for picked, size in ((tokens, "V"), (bits, "d")):
            head = {"hidden": hidden, "weight": torch.zeros(0, 4), "bias": torch.zeros(0), "tokens": picked}
            message = rf"{function.__name__}: weight: expected {size} of at least 1, got \(0, 4\)"
            with pytest.raises(ValueError, match=message):
                function(**head, **settings, backend=backend)
            given = {"hidden": hidden[..., :0], "weight": None, "bias": None, "tokens": picked}
            message = rf"{function.__name__}: hidden: expected {size} of at least 1, got \(2, 5, 0\)"
            with pytest.raises(ValueError, match=message):
                function(**given, **settings, backend=backend)


CHECKS = (
    common_offset,
    infinite_logits,
    untrained_tokens,
    trained_tokens,
    nothing_times_infinity,
    certain_bits,
    certain_bits_are_drawn,
    no_tokens,
    no_vocabulary,
)
