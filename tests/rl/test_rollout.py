"""Rollouts and segment losses: the checks that isolate each part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from policies import policy, redness

from fastvar.models import VAR
from fastvar.ops import policy_loss
from fastvar.rl.rewards import Reward, RewardSum
from fastvar.rl.rollout import Rollout, RolloutOptions, coarse_rollout, fine_rollout, whole_rollout
from fastvar.rl.update import LossOptions, segment_loss

PROMPTS = ["1", "2"]
G, PLAIN = 4, RolloutOptions()


def rollout(var: VAR, kind: str, reward: Any = redness, **changes: Any) -> Rollout:
    settings: dict[str, Any] = {"group_size": G, "seed": 3, "options": PLAIN, **changes}
    rewards = RewardSum({"it": reward})
    if kind == "whole":
        return whole_rollout(var, PROMPTS, rewards, **settings)
    if kind == "fine":
        return fine_rollout(var, PROMPTS, rewards, **{"middle": 2, **settings})
    return coarse_rollout(var, PROMPTS, rewards, **{"middle": 2, "continuations": 3, "eta": 1.0, **settings})


def gradients(var: VAR, drawn: Rollout, options: LossOptions, **settings: Any) -> list[torch.Tensor]:
    var.zero_grad()
    segment_loss(var, drawn, options, group_size=G, **settings).loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in var.parameters()]


@pytest.mark.parametrize("kind", ["whole", "fine", "coarse"])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_log_probs_of_rollout_and_training_agree(kind: str, guidance: float) -> None:
    """Drawn scale by scale on a cache (and on forks of it), scored by teacher forcing; the ratio is exactly 1."""
    var = policy()
    options = RolloutOptions(guidance=guidance, top_k=5, temperature=0.8)
    drawn = rollout(var, kind, options=options)
    scored = segment_loss(var, drawn, LossOptions(), group_size=G, temperature=0.8)
    torch.testing.assert_close(scored.log_probs, drawn.log_probs, rtol=0, atol=1e-4)
    assert scored.ratio == 1 and scored.clip_fraction == 0
    again = segment_loss(var, drawn, LossOptions(), group_size=G, temperature=0.8, on_policy=False)
    assert again.ratio.item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(again.loss, scored.loss, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["whole", "fine", "coarse"])
def test_chunks_do_not_change_the_images(kind: str) -> None:
    var = policy()
    whole, parts = rollout(var, kind), rollout(var, kind, options=RolloutOptions(chunk=G))
    assert torch.equal(whole.tokens, parts.tokens)
    torch.testing.assert_close(whole.returns, parts.returns)


def test_shapes_of_the_segments() -> None:
    var = policy()
    ends = var.schedule.ends
    coarse, fine, whole = (rollout(var, kind) for kind in ("coarse", "fine", "whole"))
    assert coarse.tokens.shape == (8, ends[1]) and len(coarse.images) == 8 * 3 == len(coarse.rewards["it"])
    assert coarse.first_scale == 0 and coarse.returns.shape == (8,)
    assert fine.tokens.shape == (8, ends[2]) and fine.first_scale == 2 and len(fine.images) == 8
    assert whole.tokens.shape == (8, ends[2]) and whole.prompts == ["1"] * 4 + ["2"] * 4
    groups = fine.tokens.view(2, G, -1)
    assert (groups[:, :, : ends[1]] == groups[:, :1, : ends[1]]).all()  # one coarse segment a group
    assert not (groups[:, :, ends[1] :] == groups[:, :1, ends[1] :]).all()
    assert not torch.equal(groups[0, 0], groups[1, 0])


def test_coarse_return_is_the_value_of_its_continuations() -> None:
    var = policy()
    drawn = rollout(var, "coarse", eta=0.5)
    expected = 0.5 * (drawn.rewards["it"].view(8, 3) / 0.5).exp().mean(1).log()
    torch.testing.assert_close(drawn.returns, expected)


def test_continuations_recompute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that pass the network: the coarse ones once per segment, the fine ones once per continuation."""
    var = policy()
    passed = []
    original = VAR.sample_scale

    def counted(self: VAR, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        passed.append(x.shape[0] * x.shape[1])
        return original(self, x, *args, **options)

    monkeypatch.setattr(VAR, "sample_scale", counted)
    rollout(var, "coarse")
    assert sum(passed) == 8 * 5 + 24 * 9


def test_coarse_update_runs_the_coarse_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    var = policy()
    drawn = rollout(var, "coarse")
    lengths = []
    original = VAR.embed
    monkeypatch.setattr(
        VAR, "embed", lambda self, *args: lengths.append(original(self, *args).shape[1]) or original(self, *args)
    )
    gradients(var, drawn, LossOptions())
    assert lengths == [5]


def test_constant_reward_gives_no_gradient() -> None:
    var = policy()
    for kind in ("whole", "fine", "coarse"):
        drawn = rollout(var, kind, lambda i, p, r: torch.full((len(i),), 0.7))
        assert all((g == 0).all() for g in gradients(var, drawn, LossOptions()))


def test_zero_kl_weight_needs_no_reference_and_others_do() -> None:
    var = policy()
    drawn = rollout(var, "whole")
    plain = gradients(var, drawn, LossOptions())
    with_reference = gradients(var, drawn, LossOptions(), reference=policy(1))
    assert all(torch.equal(a, b) for a, b in zip(plain, with_reference, strict=True))
    with pytest.raises(ValueError, match="segment_loss: reference: expected a model"):
        segment_loss(var, drawn, LossOptions(kl_weight=0.1), group_size=G)


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_kl_to_itself_is_zero_and_to_another_is_not(estimator: str) -> None:
    var = policy()
    drawn = rollout(var, "whole")
    options = LossOptions(kl_weight=0.1, kl_estimator=estimator)
    same = segment_loss(var, drawn, options, group_size=G, reference=policy())
    other = segment_loss(var, drawn, options, group_size=G, reference=policy(1))
    assert same.kl.abs() < 1e-6 and other.kl > 1e-4


@pytest.mark.parametrize("kind", ["whole", "fine", "coarse"])
def test_tokens_outside_the_mask_have_no_gradient(kind: str) -> None:
    def corner(images: torch.Tensor, prompts: Sequence[str], references: Any) -> Reward:
        mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        mask[:, :2, :2] = True
        return Reward(images[:, 0, :2, :2].mean((1, 2)), mask)

    var = policy()
    drawn = rollout(var, kind, corner, use_mask=True)
    assert drawn.mask is not None and drawn.mask.shape == drawn.tokens.shape
    assert drawn.mask[:, 0].all() and drawn.mask[:, 1].all() and not drawn.mask[:, 4].any()
    unmasked = rollout(var, kind, corner)
    assert unmasked.mask is None and torch.equal(unmasked.tokens, drawn.tokens)
    inputs = var.tokenizer.teacher_forcing(drawn.tokens)[:, : drawn.tokens.shape[1] - 1]
    logits = var(drawn.prompts, inputs).detach().requires_grad_()
    schedule = var.schedule.with_num_tokens(drawn.tokens.shape[1])
    loss = policy_loss(
        logits,
        None,
        None,
        drawn.tokens,
        drawn.returns,
        schedule,
        group_size=G,
        token_mask=drawn.mask,
        first_scale=drawn.first_scale,
    ).loss
    loss.backward()
    trained = drawn.mask.clone()
    trained[:, : schedule.starts[drawn.first_scale]] = False
    assert (logits.grad[~trained] == 0).all() and (logits.grad[trained] != 0).any()


def test_wrong_middle() -> None:
    for middle in (0, 3):
        with pytest.raises(ValueError, match=f"rollout: middle: expected 1 to 2, got {middle}"):
            rollout(policy(), "coarse", middle=middle)
