"""Rollouts and segment losses: the checks that isolate each part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastvar.models import VAR, SamplingOptions
from fastvar.ops import PolicyLossOptions, group_advantages, policy_loss
from fastvar.rl.prompts import Prompts
from fastvar.rl.returns import middle_returns
from fastvar.rl.rewards import Reward, RewardSum
from fastvar.rl.rollout import Rollout, roll_out
from fastvar.rl.scores import score
from fastvar.rl.update import segment_loss, token_totals
from tests.helpers.policies import policy, redness

PROMPTS = Prompts(["1", "2"])
G, PLAIN = 4, SamplingOptions()
DEFAULT = PolicyLossOptions()
KINDS: Any = pytest.mark.parametrize("kind", ["whole", "fine", "coarse"])


def rollout(var: VAR, kind: Any, prompts: Prompts = PROMPTS, **changes: Any) -> Rollout:
    settings: dict[str, Any] = {"group_size": G, "seed": 3, "options": PLAIN, "middle": 2, "continuations": 3}
    return roll_out(var, prompts, segment=kind, **{**settings, **changes})


def returns_of(var: VAR, drawn: Rollout, reward: Any = redness, eta: float = 1.0) -> torch.Tensor:
    rewards = RewardSum({"it": reward})
    return middle_returns(rewards.combine(score(drawn, rewards, var.schedule).each), drawn.continuations, eta=eta)


def advantages_of(var: VAR, drawn: Rollout, reward: Any = redness) -> torch.Tensor:
    return group_advantages(returns_of(var, drawn, reward), G)


def gradients(
    var: VAR, drawn: Rollout, options: PolicyLossOptions = DEFAULT, reward: Any = redness, **settings: Any
) -> list[torch.Tensor]:
    var.zero_grad()
    segment_loss(var, drawn, advantages_of(var, drawn, reward), options, **settings).loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in var.parameters()]


@KINDS
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_log_probs_of_rollout_and_training_agree(kind: str, guidance: float) -> None:
    """Drawn scale by scale on a cache (and on forks of it), scored by teacher forcing; the ratio is exactly 1."""
    var = policy()
    drawn = rollout(var, kind, options=SamplingOptions(guidance=guidance, top_k=5, temperature=0.8))
    advantages = advantages_of(var, drawn)
    scored = segment_loss(var, drawn, advantages, PolicyLossOptions(), temperature=0.8)
    torch.testing.assert_close(scored.log_probs, drawn.log_probs, rtol=0, atol=1e-4)
    assert scored.ratio == 1 and scored.clip_fraction == 0
    again = segment_loss(var, drawn, advantages, PolicyLossOptions(), temperature=0.8, old_log_probs=drawn.log_probs)
    assert again.ratio.item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(again.loss, scored.loss, rtol=1e-3, atol=1e-4)


@KINDS
@pytest.mark.parametrize("chunk", [3, 5])
def test_chunks_do_not_change_the_images(kind: str, chunk: int) -> None:
    var = policy()
    whole, parts = rollout(var, kind), rollout(var, kind, options=SamplingOptions(batch_size=chunk))
    assert torch.equal(whole.tokens, parts.tokens)
    torch.testing.assert_close(whole.images, parts.images)


@KINDS
def test_rows_do_not_depend_on_who_draws_them(kind: str) -> None:
    """Three processes share two groups of four: every group straddles two of them, the images stay the same."""
    var = policy()
    whole = rollout(var, kind)
    shares = [rollout(var, kind, rows=rows) for rows in (range(0, 3), range(3, 6), range(6, 8))]
    assert torch.equal(torch.cat([share.tokens for share in shares]), whole.tokens)
    torch.testing.assert_close(torch.cat([share.images for share in shares]), whole.images)
    assert [text for share in shares for text in share.prompts.texts] == whole.prompts.texts


def test_shapes_of_the_segments() -> None:
    var = policy()
    ends = var.schedule.ends
    coarse, fine, whole = (rollout(var, kind) for kind in ("coarse", "fine", "whole"))
    assert coarse.tokens.shape == (8, ends[1]) and len(coarse.images) == 8 * 3
    assert coarse.first_scale == 0 and coarse.continuations == 3
    assert fine.tokens.shape == (8, ends[2]) and fine.first_scale == 2 and len(fine.images) == 8
    assert whole.tokens.shape == (8, ends[2]) and whole.prompts.texts == ["1"] * 4 + ["2"] * 4
    groups = fine.tokens.view(2, G, -1)
    assert (groups[:, :, : ends[1]] == groups[:, :1, : ends[1]]).all()  # one coarse segment a group
    assert not (groups[:, :, ends[1] :] == groups[:, :1, ends[1] :]).all()
    assert not torch.equal(groups[0, 0], groups[1, 0])


def test_coarse_return_is_the_value_of_its_continuations() -> None:
    var = policy()
    drawn = rollout(var, "coarse")
    rewards = redness(drawn.images, [], None).view(8, 3)
    torch.testing.assert_close(returns_of(var, drawn, eta=0.5).float(), 0.5 * (rewards / 0.5).exp().mean(1).log())


@KINDS
def test_continuations_recompute_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that pass the network: shared ones once, however many continue from them."""
    var = policy()
    passed = []
    original = VAR.sample_scale

    def counted(self: VAR, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        passed.append(x.shape[0] * x.shape[1])
        return original(self, x, *args, **options)

    monkeypatch.setattr(VAR, "sample_scale", counted)
    drawn = rollout(var, kind)
    expected = {"whole": 8 * 14, "coarse": 8 * 5 + 24 * 9, "fine": 2 * 5 + 8 * 9}[kind]
    assert sum(passed) == expected == drawn.passed_tokens


def test_coarse_update_runs_the_coarse_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    var = policy()
    drawn = rollout(var, "coarse")
    lengths = []
    original = VAR.embed
    monkeypatch.setattr(
        VAR, "embed", lambda self, *args: lengths.append(original(self, *args).shape[1]) or original(self, *args)
    )
    gradients(var, drawn)
    assert lengths == [5]


@pytest.mark.parametrize("normalisation", ["per_segment", "per_scale", "none"])
@KINDS
def test_last_scale_as_middle_with_one_continuation_is_plain_grpo(kind: str, normalisation: str) -> None:
    """alpha 0 is the plain mean, a mask of ones is no mask, one continuation is worth its reward: bit-equal."""
    var = policy()
    drawn = rollout(var, kind, continuations=1)
    assert torch.equal(returns_of(var, drawn), redness(drawn.images, [], None))
    ones = torch.ones_like(drawn.log_probs)
    options = PolicyLossOptions(panw_normalisation=normalisation)
    for a, b in zip(gradients(var, drawn, options), gradients(var, drawn, options, mask=ones), strict=True):
        assert torch.equal(a, b)
    if kind == "coarse":
        coarse, whole = rollout(var, kind, continuations=1), rollout(var, "whole")
        assert torch.equal(coarse.tokens, whole.tokens[:, :5])  # the same draws, the last scale from another seed


@pytest.mark.parametrize("normalisation", ["per_segment", "per_scale", "none"])
@pytest.mark.parametrize("masked", [False, True])
@KINDS
def test_gradients_of_parts_add_up(kind: str, masked: bool, normalisation: str) -> None:
    """Micro-batches that cut groups anywhere, with masks that differ between them."""
    var = policy()
    drawn = rollout(var, kind)
    schedule = var.schedule.with_num_tokens(drawn.tokens.shape[1])
    mask = torch.ones_like(drawn.log_probs)
    if masked:
        mask = (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.6).float()
    mask[:, : schedule.starts[drawn.first_scale]] = 0
    options = PolicyLossOptions(panw_normalisation=normalisation, ratio_level="scale")
    whole = gradients(var, drawn, options, mask=mask)
    totals = token_totals(mask, schedule)
    sums = [torch.zeros_like(g) for g in whole]
    for rows in ([0, 1, 2], [3, 4, 5, 6], [7]):
        part = gradients(var, drawn, options, mask=mask, mask_totals=totals, rows=rows)
        sums = [a + b for a, b in zip(sums, part, strict=True)]
    for a, b in zip(whole, sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_constant_reward_gives_no_gradient() -> None:
    var = policy()
    for kind in ("whole", "fine", "coarse"):
        drawn = rollout(var, kind)
        assert all((g == 0).all() for g in gradients(var, drawn, reward=lambda i, p, r: torch.full((len(i),), 0.7)))


def test_zero_kl_weight_needs_no_reference_and_others_do() -> None:
    var = policy()
    drawn = rollout(var, "whole")
    plain, with_reference = gradients(var, drawn), gradients(var, drawn, reference=policy(1))
    assert all(torch.equal(a, b) for a, b in zip(plain, with_reference, strict=True))
    with pytest.raises(ValueError, match="segment_loss: reference: expected a model"):
        segment_loss(var, drawn, advantages_of(var, drawn), PolicyLossOptions(kl_weight=0.1))


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_kl_to_itself_is_zero_and_to_another_is_not(estimator: str) -> None:
    var = policy()
    drawn = rollout(var, "whole")
    advantages = advantages_of(var, drawn)
    options = PolicyLossOptions(kl_weight=0.1, kl_estimator=estimator)
    same = segment_loss(var, drawn, advantages, options, reference=policy())
    other = segment_loss(var, drawn, advantages, options, reference=policy(1))
    assert same.kl.abs() < 1e-6 and other.kl > 1e-4


@KINDS
def test_tokens_outside_the_mask_have_no_gradient(kind: str) -> None:
    def corner(images: torch.Tensor, prompts: Sequence[str], references: Any) -> Reward:
        mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        mask[:, :2, :2] = True
        return Reward(images[:, 0, :2, :2].mean((1, 2)), mask)

    var = policy()
    drawn = rollout(var, kind)
    rewards = RewardSum({"corner": corner})
    mask = score(drawn, rewards, var.schedule, use_mask=True).mask
    assert score(drawn, rewards, var.schedule).mask is None
    assert mask is not None and mask.shape == drawn.tokens.shape
    assert mask[:, 0].all() and mask[:, 1].all() and not mask[:, 4].any()
    inputs = var.tokenizer.teacher_forcing(drawn.tokens)[:, : drawn.tokens.shape[1] - 1]
    logits = var(drawn.prompts.texts, inputs).detach().requires_grad_()
    schedule = var.schedule.with_num_tokens(drawn.tokens.shape[1])
    loss = policy_loss(
        logits,
        drawn.tokens,
        advantages_of(var, drawn, corner),
        schedule,
        PolicyLossOptions(panw_alpha=0.0),
        token_mask=mask,
        first_scale=drawn.first_scale,
    ).loss
    loss.backward()
    trained = mask.clone()
    trained[:, : schedule.starts[drawn.first_scale]] = False
    assert (logits.grad[~trained] == 0).all() and (logits.grad[trained] != 0).any()


@pytest.mark.parametrize("subject", ["block_causal", "last_scale", "interleaved"])
@KINDS
def test_subjects_are_shared_by_their_group(kind: str, subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prefix a group in rollouts and updates; rows that cut groups give the same numbers with a prefix each."""
    var = policy().add_subject(subject)
    references = torch.rand(2, 3, *var.tokenizer.config.image_size, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(["1", "2"], references=references)
    prefilled = []
    original = VAR._subject_stream
    monkeypatch.setattr(
        VAR,
        "_subject_stream",
        lambda self, subject, *rest: prefilled.append(len(subject)) or original(self, subject, *rest),
    )
    drawn = rollout(var, kind, prompts)
    advantages = advantages_of(var, drawn)
    whole = segment_loss(var, drawn, advantages, PolicyLossOptions())
    assert prefilled == [2, 2]  # once a group when drawing and when training
    torch.testing.assert_close(whole.log_probs, drawn.log_probs, rtol=0, atol=1e-4)
    part = segment_loss(var, drawn, advantages, PolicyLossOptions(), rows=[3, 4, 5, 6])
    assert prefilled[-1] == 4
    torch.testing.assert_close(part.log_probs, whole.log_probs[3:7], rtol=0, atol=1e-5)
    other = rollout(var, kind, Prompts(["1", "2"], references=references.flip(0)))
    assert not torch.equal(other.tokens, drawn.tokens)


def test_class_labels_as_conditions() -> None:
    prompts = Prompts(["a one", "a two"], labels=torch.tensor([[1], [2]]))
    drawn = rollout(policy(), "whole", prompts)
    assert torch.equal(drawn.tokens, rollout(policy(), "whole").tokens)
    assert drawn.prompts.texts[0] == "a one"


def test_clear_errors() -> None:
    for middle in (0, 3):
        with pytest.raises(ValueError, match=f"roll_out: middle: expected 1 to 2, got {middle}"):
            rollout(policy(), "coarse", middle=middle)
    with pytest.raises(ValueError, match="Prompts: texts: expected at least one"):
        Prompts([])
    with pytest.raises(ValueError, match="Prompts: references: expected one for each of 1, got 2"):
        Prompts(["1"], references=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="references: expected None, as the model has no subject prefix"):
        rollout(policy(), "whole", Prompts(["1"], references=torch.zeros(1, 3, 8, 8)))


def test_graphs_reach_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    var, asked = policy(), []
    generate = var.generate
    monkeypatch.setattr(type(var), "generate", lambda _, *a, graphs, **k: (asked.append(graphs), generate(*a, **k))[1])
    for graphs in (True, False):
        rollout(var, "whole", options=SamplingOptions(graphs=graphs))
    assert asked == [None, False], "where they can be used, and nowhere"
