"""Every setting reaches the place where it acts: what a loss, a gradient or a step is, computed by hand from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fastvar.models import VAR, SamplingOptions
from fastvar.ops import PolicyLoss
from fastvar.random import derive
from fastvar.rl import (
    PolicyLossOptions,
    Prompts,
    RLConfig,
    Rollout,
    VMRGRPOTrainer,
    add_adapters,
    middle_returns,
    roll_out,
    score,
    segment_loss,
)
from fastvar.rl.choose_middle import intraclass_correlation
from fastvar.rl.evaluate import draw_evaluation, evaluate_policy, score_evaluation, summarise
from fastvar.rl.prompts import subject_of
from fastvar.rl.rewards import Reward, RewardSum
from tests.helpers.policies import policy, redness

PROMPTS = Prompts(["1", "2"])
QUICK = RLConfig(iterations=1, prompts=2, group_size=4, learning_rate=1e-3, continuations=3)
PLAIN = PolicyLossOptions(panw_alpha=0.0)


def drawn(segment: Any = "whole", **options: Any) -> Rollout:
    return roll_out(
        policy(),
        PROMPTS,
        segment=segment,
        group_size=4,
        middle=2,
        continuations=3,
        seed=3,
        options=SamplingOptions(**options),
    )


def trainer(output: Path, config: RLConfig = QUICK, reward: Any = redness) -> VMRGRPOTrainer:
    return VMRGRPOTrainer(policy(), RewardSum({"it": reward}), PROMPTS, config, output)


def loss_of(
    options: PolicyLossOptions, advantage: float = 0.0, rollout: Rollout | None = None, **settings: Any
) -> PolicyLoss:
    return segment_loss(policy(), rollout or drawn(), torch.full((8,), advantage), options, **settings)


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_kl(estimator: str) -> None:
    """Its weight, its estimator, and whose it is."""
    found = loss_of(replace(PLAIN, kl_weight=0.5, kl_estimator=estimator), reference=policy(1))
    torch.testing.assert_close(found.loss, 0.5 * found.kl)
    rollout = drawn()
    inputs = policy().tokenizer.teacher_forcing(rollout.tokens)
    own, other = (policy(seed)(rollout.prompts.texts, inputs).log_softmax(-1) for seed in (0, 1))
    gap = (other - own).gather(-1, rollout.tokens[..., None])
    expected = {"exact": (own.exp() * (own - other)).sum(-1), "k2": gap.square() / 2, "k3": gap.exp() - gap - 1}
    torch.testing.assert_close(found.kl, expected[estimator].mean(), rtol=1e-4, atol=1e-5)


def test_entropy_weight() -> None:
    found = loss_of(replace(PLAIN, entropy_weight=0.5))
    torch.testing.assert_close(found.loss, -0.5 * found.entropy)


@pytest.mark.parametrize(("advantage", "moved", "expected"), [(1.0, -1.0, -1.4), (-1.0, 1.0, 0.9)])
def test_clipping_has_two_sides(advantage: float, moved: float, expected: float) -> None:
    """A ratio of e is clipped to 1 + clip_high, one of 1 / e to 1 - clip_low."""
    old = loss_of(PLAIN).log_probs.detach() + moved
    found = loss_of(replace(PLAIN, clip_low=0.1, clip_high=0.4), advantage, old_log_probs=old)
    assert found.loss.item() == pytest.approx(expected, rel=1e-4) and found.clip_fraction == 1


@pytest.mark.parametrize("level", ["token", "scale", "sample"])
def test_ratio_level(level: str) -> None:
    """One token of each sample has a ratio of e; a mean over more tokens spreads it."""
    old = loss_of(PLAIN).log_probs.detach()
    old[:, -1] -= 1
    tokens = {"token": 1, "scale": 9, "sample": 14}[level]
    expected = (tokens * torch.tensor(1 / tokens).exp() + 14 - tokens) / 14
    options = replace(PLAIN, ratio_level=level, clip_low=1e9, clip_high=1e9)
    assert loss_of(options, 1.0, old_log_probs=old).loss.item() == pytest.approx(-expected.item(), rel=1e-4)


def test_per_action_normalisation() -> None:
    """Of two trained tokens, one on a grid of 1 x 1 and one of 3 x 3, the second weighs 9^-alpha."""
    mask = torch.zeros(8, 14)
    mask[:, 0] = mask[:, -1] = 1
    for normalisation, expected in (("per_segment", -1.0), ("none", -(1 + 9**-0.7) / 2)):
        options = PolicyLossOptions(panw_alpha=0.7, panw_normalisation=normalisation)
        assert loss_of(options, 1.0, mask=mask).loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_temperature_of_policy_and_reference(estimator: str) -> None:
    """Both are taken at the temperature of the rollout: a reference that is the policy is at no distance from it."""
    options, rollout = replace(PLAIN, kl_weight=1.0, kl_estimator=estimator), drawn(temperature=0.5)
    found = loss_of(options, rollout=rollout, reference=policy(), temperature=0.5)
    torch.testing.assert_close(found.log_probs, rollout.log_probs, rtol=0, atol=1e-4)
    assert found.kl.abs() < 1e-6


def test_a_part_has_its_own_rows() -> None:
    """Old log-probabilities, masks and advantages are those of the rows of the part."""
    rows, old = [2, 5, 7], loss_of(PLAIN).log_probs.detach()
    advantages = torch.arange(8.0)
    mask = torch.zeros(8, 14)
    mask[rows, rows] = 1
    found = segment_loss(
        policy(), drawn(), advantages, replace(PLAIN, clip_high=1e9), rows=rows, mask=mask, old_log_probs=old
    )
    assert found.ratio.item() == pytest.approx(1, abs=1e-5)
    assert found.loss.item() == pytest.approx(-(2 + 5 + 7) / 3, rel=1e-4)


def test_mask_is_the_union_over_the_continuations() -> None:
    """The first continuation is decided at the left, the second at the right, the third nowhere."""

    def sides(images: torch.Tensor, prompts: Sequence[str], references: Any) -> Reward:
        mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        mask[0::3, :, :2] = mask[1::3, :, -2:] = True
        return Reward(redness(images, prompts, references), mask)

    mask = score(drawn("coarse"), RewardSum({"it": sides}), policy().schedule, use_mask=True).mask
    assert mask is not None and mask.shape == (8, 5) and mask.all()


def test_prompts_of_continuations_are_adjacent() -> None:
    prompts = Prompts(["a", "b"], labels=torch.tensor([4, 5]), references=torch.arange(2.0).view(2, 1, 1, 1))
    found = prompts.repeated(3)
    assert found.texts == ["a"] * 3 + ["b"] * 3 and found.labels.tolist() == [4] * 3 + [5] * 3  # type: ignore[union-attr]
    assert found.references is not None and found.references.flatten().tolist() == [0.0] * 3 + [1.0] * 3
    seen: list[str] = []
    score(drawn("coarse"), RewardSum({"it": lambda i, p, r: seen.extend(p) or torch.zeros(len(i))}), policy().schedule)
    assert seen == ["1"] * 12 + ["2"] * 12


def test_soft_value_of_the_continuations_that_are_there() -> None:
    rewards = torch.tensor([1.0, 5.0, torch.nan], dtype=torch.float64)
    for eta in (0.5, 50.0):
        expected = eta * (rewards[:2] / eta).exp().mean().log()
        torch.testing.assert_close(middle_returns(rewards, 3, eta=eta)[0], expected)


def test_rollouts_are_drawn_as_told() -> None:
    """As `generate` draws with the same options."""
    options: dict[str, Any] = {"guidance": 1.5, "temperature": 0.7, "top_k": 6, "top_p": 0.8}
    rollout, var = drawn(**options), policy()
    expected = var.generate(["1"] * 4 + ["2"] * 4, seed=3, log_probs=True, **options)
    assert torch.equal(rollout.tokens, expected.tokens) and rollout.passed_tokens == 2 * 8 * 14
    for name, value in {"guidance": 0.3, "temperature": 0.2, "top_k": 2, "top_p": 0.2}.items():
        other = var.generate(["1"] * 4 + ["2"] * 4, seed=3, **{**options, name: value})
        assert not torch.equal(rollout.tokens, other.tokens), name


@pytest.mark.parametrize("own", [False, True], ids=["complete", "own tokens"])
def test_references_reach_the_model_as_it_was_trained(own: bool) -> None:
    """Images in [0, 1], encoded in [-1, 1]."""
    var = policy().add_subject(own_tokens=own)
    references = torch.rand(2, 3, *var.tokenizer.config.image_size, generator=torch.Generator().manual_seed(0))
    found = subject_of(var, Prompts(["1", "2"], references=references))
    tokens = var.tokenizer.encode(2 * references - 1)
    expected = var.tokenizer.codes(tokens) if own else var.tokenizer.pyramid(tokens)
    assert found is not None and torch.equal(found, expected)


def test_other_prompts_have_another_fingerprint() -> None:
    references = torch.zeros(2, 3, 4, 4)
    found = [
        Prompts(["1", "2"]),
        Prompts(["1", "3"]),
        Prompts(["1", "2"], labels=torch.tensor([1, 2])),
        Prompts(["1", "2"], labels=torch.tensor([1, 3])),
        Prompts(["1", "2"], references=references),
        Prompts(["1", "2"], references=references + 1),
    ]
    assert len({prompts.fingerprint() for prompts in found}) == len(found)


def test_every_iteration_and_seed_draws_anew(tmp_path: Path) -> None:
    many = Prompts([str(i) for i in range(10)])
    seen = []
    for seed in (0, 1):
        training = VMRGRPOTrainer(policy(), RewardSum({"it": redness}), many, replace(QUICK, seed=seed), tmp_path)
        seen += [training.roll_out(iteration) for iteration in (0, 1)]
    assert len({tuple(rollout.prompts.texts) for rollout in seen}) == len(seen)
    assert len({tuple(rollout.tokens.flatten().tolist()) for rollout in seen}) == len(seen)


def test_a_prompt_that_comes_again_is_drawn_anew(tmp_path: Path) -> None:
    seen = []
    for seed in (0, 1):
        config = replace(QUICK, seed=seed)
        training = VMRGRPOTrainer(policy(), RewardSum({"it": redness}), Prompts(["1"]), config, tmp_path)
        seen += [training.roll_out(iteration) for iteration in (0, 1)]
    assert len({tuple(rollout.tokens.flatten().tolist()) for rollout in seen}) == len(seen)


def test_evaluations_spread_over_the_prompts() -> None:
    """Shares of the processes together are the whole."""
    many = Prompts([str(i) for i in range(9)])
    whole = draw_evaluation(policy(), many, samples=12, options=SamplingOptions())
    assert whole.prompts.texts == ["0"] * 4 + ["3"] * 4 + ["6"] * 4
    parts = [draw_evaluation(policy(), many, samples=12, options=SamplingOptions(), share=(i, 2)) for i in (0, 1)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert [len(part.tokens) for part in parts] == [4, 8]


def test_more_processes_than_prompts_of_an_evaluation() -> None:
    """All draw as many images, and those who have none ask no reward."""
    few, reward = Prompts(["1", "2"]), RewardSum({"it": redness})
    shares = [draw_evaluation(policy(), few, samples=8, options=SamplingOptions(), share=(i, 3)) for i in range(3)]
    assert [len(share.tokens) for share in shares] == [0, 4, 4]
    assert len({share.passed_tokens for share in shares}) == 1
    whole = evaluate_policy(policy(), reward, few, samples=8, options=SamplingOptions())
    found = summarise([score_evaluation(share, reward) for share in shares], reward)
    assert torch.equal(found.images, whole.images) and found.metrics == whole.metrics
    assert found.prompts.texts == whole.prompts.texts


def test_gradients_of_one_update_do_not_reach_the_next(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    first = training.iteration(0)["gradient_norm"]
    assert first > 0 and all(p.grad is None for p in training.policy.parameters())


def test_returns_and_advantages_of_the_settings(tmp_path: Path) -> None:
    """eta, the spread floor and what the spread is of."""
    for normalise in ("group", "batch", "none"):
        training = trainer(tmp_path / normalise, replace(QUICK, eta=0.2, spread_floor=0.3, normalise=normalise))
        rollout = training.roll_out(0)
        graded = training.grade(rollout)
        rewards = redness(rollout.images, [], None).double().view(2, 4, 3)
        returns = 0.2 * (rewards / 0.2).exp().mean(2).log()
        assert graded.metrics["return"] == pytest.approx(returns.mean().item())
        assert graded.metrics["reward"] == pytest.approx(rewards.mean().item())
        assert graded.metrics["explained_by_coarse"] == pytest.approx(intraclass_correlation(rewards))
        spread = {
            "group": returns.std(1, correction=0, keepdim=True) + 0.3,
            "batch": returns.std(correction=0) + 0.3,
            "none": torch.ones(1),
        }[normalise]
        expected = (returns - returns.mean(1, keepdim=True)) / spread
        torch.testing.assert_close(graded.advantages, expected.flatten().float(), rtol=1e-4, atol=1e-5)


def test_temperature_of_the_trainer(tmp_path: Path) -> None:
    """Rollout and update take the same one, or their log-probabilities would differ."""
    training = trainer(tmp_path, replace(QUICK, rollout=SamplingOptions(temperature=0.6)))
    assert training.iteration(0)["rollout_difference"] < 1e-4
    hot = trainer(tmp_path, QUICK).roll_out(0)
    assert not torch.equal(training.roll_out(0).tokens, hot.tokens)


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("segment", [0, 3])
def test_second_update_is_compared_with_its_own_rows(segment: int, micro_batch: int, tmp_path: Path) -> None:
    """Where the first update moves nothing the ratio is 1, in every micro-batch."""
    config = replace(QUICK, updates=2, micro_batch=micro_batch, learning_rate=1e-12, weight_decay=0.0)
    found = trainer(tmp_path, config).iteration(segment)
    assert found["ratio"] == pytest.approx(1, abs=1e-5) and found["clip_fraction"] == 0


@pytest.mark.parametrize("rescore", [True, False])
def test_rescoring(rescore: bool, tmp_path: Path) -> None:
    """The old log-probabilities are those of the first update's pass, or those of the rollout."""
    training = trainer(tmp_path, replace(QUICK, updates=3, rescore=rescore))
    update = training.update
    calls: list[tuple[Any, ...]] = []

    def watched(rollout: Any, graded: Any, old: Any) -> Any:
        found = update(rollout, graded, old)
        calls.append((old, found[1] if rescore else rollout.log_probs))
        return found

    training.update = watched  # type: ignore[method-assign]
    training.iteration(0)
    (first, expected), (second, _), (third, _) = calls
    assert first is None and second is expected and third is expected


def test_optimizer_of_the_trainer(tmp_path: Path) -> None:
    training = trainer(tmp_path, replace(QUICK, weight_decay=0.3, betas=(0.5, 0.6), learning_rate=0.02, ema_decay=0.4))
    decayed, plain = training.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all((group["betas"], group["lr"]) == ((0.5, 0.6), 0.02) for group in (decayed, plain))
    training.iteration(0)
    assert (training.ema.decay, training.ema.updates) == (0.4, 1)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_gradients_of_the_trainer_are_clipped(clip_norm: float, tmp_path: Path) -> None:
    training = trainer(tmp_path, replace(QUICK, clip_norm=clip_norm))
    norms: list[float] = []

    def step() -> None:
        gradients = [p.grad for p in training.policy.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    training.optimizer.step = step
    found = training.iteration(0)["gradient_norm"]
    assert found > 1e-2 and norms == [pytest.approx(min(found, clip_norm), rel=1e-3)]


def test_the_fine_segment_is_trained_alone(tmp_path: Path) -> None:
    found = loss_of(PLAIN, 1.0, drawn("fine"))
    assert found.gradient_share.tolist() == [0, 0, 1]
    torch.testing.assert_close(found.entropy, found.scale_entropy[2])
    training = trainer(tmp_path)
    graded = training.grade(training.roll_out(3))
    assert graded.totals.tolist() == [0, 0, 8 * 9] and (graded.mask[:, :5] == 0).all()


def test_loss_of_the_trainer(tmp_path: Path) -> None:
    loss = PolicyLossOptions(entropy_weight=0.5, panw_alpha=0.3, kl_weight=0.1, kl_estimator="k2")
    training = VMRGRPOTrainer(
        policy(), RewardSum({"it": redness}), PROMPTS, replace(QUICK, loss=loss), tmp_path, reference=policy(1)
    )
    rollout = training.roll_out(0)
    advantages = training.grade(rollout).advantages
    expected = segment_loss(policy(), rollout, advantages, loss, reference=policy(1))
    found = training.iteration(0)
    for name in ("loss", "kl", "entropy"):
        assert found[name] == pytest.approx(getattr(expected, name).item(), rel=1e-4, abs=1e-5), name


def test_the_best_is_kept(tmp_path: Path) -> None:
    """Of the averaged weights, which are the ones that an evaluation draws from."""
    value, seen = 0.0, torch.empty(0)

    def reward(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        nonlocal seen
        seen = images
        return torch.full((len(images),), value)

    training = trainer(tmp_path, replace(QUICK, evaluation_samples=8), reward)
    average, log = training.ema.model, Mock()
    for step, (value, best) in enumerate([(2.0, 1), (1.0, 1), (3.0, 3)], 1):
        average.head.bias.data.fill_(step).add_(torch.arange(len(average.head.bias)))
        assert training.evaluate(step, log)["evaluation/return"] == value
        drawn = draw_evaluation(average, PROMPTS, samples=8, options=SamplingOptions())
        assert torch.equal(seen, drawn.images)
        assert VAR.from_pretrained(tmp_path / "best").head.bias[0] == best


def test_adapters_have_their_settings() -> None:
    pytest.importorskip("peft")
    for options, scale, count in (({"alpha": 12, "targets": ("qkv", "proj")}, 3.0, 2), ({}, 2.0, 4)):
        adapted = add_adapters(policy(), 4, **options)  # type: ignore[arg-type]
        layers = [module for module in adapted.modules() if hasattr(module, "scaling")]
        assert len(layers) == count * adapted.config.depth
        assert all(layer.scaling == {"default": scale} for layer in layers)


def test_adapters_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    plain, seeds = policy(), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    add_adapters(plain, 4, seed=7)
    assert seeds == [derive(7, "adapters")]
