"""The trainer: it learns what is rewarded and nothing from noise, resumes exactly, survives what goes wrong."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from fastvar.models import VAR, SamplingOptions
from fastvar.rl import (
    PolicyLossOptions,
    Prompts,
    RLConfig,
    VMRGRPOTrainer,
    add_adapters,
    evaluate_policy,
    merged,
    without_adapters,
)
from fastvar.rl.adapters import plain
from fastvar.rl.rewards import ColourReward, Reward, RewardSum
from fastvar.training.checkpoints import Checkpoints, saved_steps
from fastvar.training.interrupts import Interrupted
from fastvar.training.log import read_metrics
from tests.helpers.policies import policy, redness

PROMPTS = ["0", "1", "2", "3"]
QUICK = RLConfig(iterations=6, prompts=2, group_size=4, learning_rate=1e-3, save_every=1, coarse_updates=2)


def trainer(output: Path, config: RLConfig = QUICK, reward: Any = redness, seed: int = 0) -> VMRGRPOTrainer:
    return VMRGRPOTrainer(policy(seed), RewardSum({"it": reward}), PROMPTS, config, output)


def lines(output: Path) -> list[dict[str, float]]:
    found = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "memory"))} for line in found]


def learned(output: Path, reward: Any, seed: int, **changes: Any) -> float:
    config = replace(
        QUICK, iterations=50, prompts=4, group_size=8, learning_rate=3e-3, save_every=50, seed=seed, **changes
    )
    trainer(output, config, reward, seed).train()
    rewards = [line["reward/it"] for line in lines(output)]
    return fmean(rewards[-8:]) - fmean(rewards[:8])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_redness_rises(seed: int, tmp_path: Path) -> None:
    assert learned(tmp_path, redness, seed) > 0.6


def test_random_reward_teaches_nothing(tmp_path: Path) -> None:
    """The reward itself cannot rise, as it does not look at the images; what is watched is their redness: it drifts by
    up to 0.7 either way, but its mean over seeds does not rise as where it is rewarded, by 1."""

    def random(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        return torch.rand(len(images), generator=generator)

    rises = []
    for seed in (0, 1, 2):
        generator = torch.Generator()
        config = replace(QUICK, iterations=50, prompts=4, group_size=8, learning_rate=3e-3, save_every=50, seed=seed)
        rewards = RewardSum({"random": random, "red": redness}, {"red": 0.0})
        training = VMRGRPOTrainer(policy(seed), rewards, PROMPTS, config, tmp_path / str(seed))
        generator.manual_seed(seed)
        training.train()
        red = [line["reward/red"] for line in lines(tmp_path / str(seed))]
        rises.append(fmean(red[-8:]) - fmean(red[:8]))
    assert fmean(rises) < 0.4, rises


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_resume_is_exact(stop_after: int, kl_weight: float, tmp_path: Path) -> None:
    """Weights, optimizer, average, prompts, seeds and the phase of the alternation."""
    config = replace(QUICK, loss=PolicyLossOptions(kl_weight=kl_weight))
    straight = trainer(tmp_path / "straight", config).train()
    first = trainer(tmp_path / "resumed", config)
    iteration = first.iteration

    def stopping(number: int) -> dict[str, float]:
        if number == stop_after:
            raise KeyboardInterrupt
        return iteration(number)

    first.iteration = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = trainer(tmp_path / "resumed", config).train()
    assert lines(tmp_path / "resumed") == lines(tmp_path / "straight")
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_alternation() -> None:
    segments = [RLConfig(coarse_updates=3, fine_updates=1).segment(i) for i in range(8)]
    assert segments == ["coarse", "coarse", "coarse", "fine"] * 2
    assert {RLConfig(middle=0).segment(i) for i in range(8)} == {"whole"}


def test_what_is_logged(tmp_path: Path) -> None:
    config = replace(QUICK, iterations=3, loss=PolicyLossOptions(kl_weight=0.05))
    trainer(tmp_path, config).train()
    found = lines(tmp_path)
    assert [line["segment"] for line in found] == [1.0, 1.0, 2.0]
    assert all(line["ratio"] == 1 and line["rollout_difference"] < 1e-4 for line in found)
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[2]["kl"] > 0
    by_scale = {n: [found[2][f"{n}/{k}"] for k in range(3)] for n in ("gradient_share", "entropy", "ratio")}
    last = {"gradient_share": 1.0, "entropy": found[2]["entropy"], "ratio": 1.0}
    assert all(by_scale[n] == [0, 0, pytest.approx(value)] for n, value in last.items())
    assert json.loads((tmp_path / "settings.json").read_text())["rl"]["loss"]["kl_weight"] == 0.05


def test_per_action_normalisation_balances_the_scales(tmp_path: Path) -> None:
    spread = {}
    for alpha in (0.0, 0.6):
        config = replace(
            QUICK, iterations=1, prompts=4, group_size=16, middle=0, loss=PolicyLossOptions(panw_alpha=alpha)
        )
        trainer(tmp_path / str(alpha), config).train()
        share = [lines(tmp_path / str(alpha))[0][f"gradient_share/{k}"] for k in range(3)]
        spread[alpha] = max(share) / min(share)
    assert spread[0.6] < spread[0.0] / 1.5


def test_rewards_that_are_nan_are_left_out(tmp_path: Path) -> None:
    def some(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        scores = redness(images, prompts, references)
        scores[0] = math.nan
        return scores

    trainer(tmp_path, replace(QUICK, middle=0), some).train()
    assert all(line["skipped"] == 0 and math.isfinite(line["gradient_norm"]) for line in lines(tmp_path))
    with_some, without = trainer(tmp_path / "a", QUICK, some), trainer(tmp_path / "b", QUICK)
    rollout = without.roll_out(2)  # fine, one image a row
    missing, whole = (t.grade(rollout).advantages for t in (with_some, without))
    assert missing[0] == 0 and torch.equal(missing[4:], whole[4:]) and not torch.equal(missing[1:4], whole[1:4])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_missing_scores_are_missing_everywhere(bad: float, tmp_path: Path) -> None:
    """In means, spreads, evaluations and what is best, each line JSON; a group that lacks one score has a spread."""

    def some(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        scores = redness(images, prompts, references)
        scores[::4] = bad
        return scores

    config = replace(QUICK, iterations=2, middle=0, evaluate_every=1, evaluation_samples=8)
    training = trainer(tmp_path, config, some)
    training.train()
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert all(math.isfinite(value) for value in line.values())
    assert all(line["evaluation/return"] == line["evaluation/it"] for line in lines(tmp_path))
    assert (tmp_path / "best").is_dir()
    rollout = training.roll_out(0)
    groups = redness(rollout.images, [], None).double().view(2, 4)[:, 1:]
    found = training.grade(rollout).metrics
    assert found["reward"] == found["reward/it"] == found["return"] == pytest.approx(groups.mean().item())
    assert found["spread"] == pytest.approx(groups.std(1, correction=0).mean().item())
    assert found["reward_std/it"] == pytest.approx(groups.std(correction=0).item())


def test_gradient_that_is_not_finite_skips_and_in_the_end_stops(tmp_path: Path) -> None:
    """The weights stay as they were before the first bad step."""
    broken = trainer(tmp_path, replace(QUICK, iterations=9, bad_steps=2))
    before = {k: v.clone() for k, v in broken.policy.state_dict().items()}
    backward = broken.accelerator.backward
    broken.accelerator.backward = lambda loss: backward(loss * math.nan)
    with pytest.raises(RuntimeError, match="3 updates in a row had a gradient that is not finite"):
        broken.train()
    assert all(torch.equal(v, before[k]) for k, v in broken.policy.state_dict().items())
    assert [line["skipped"] for line in lines(tmp_path)] == [1, 2]
    assert [line["skipped_in_all"] for line in lines(tmp_path)] == [1, 2]


def test_reward_that_raises_loses_nothing(tmp_path: Path) -> None:
    calls = 0

    def breaks(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # the first is about a blank picture
            raise TimeoutError("the scorer is gone")
        return redness(images, prompts, references)

    seldom = replace(QUICK, save_every=100)
    with pytest.raises(RuntimeError, match="reward 'it' raised TimeoutError: the scorer is gone"):
        trainer(tmp_path / "broken", seldom, breaks).train()
    assert saved_steps(tmp_path / "broken")[-1] == 3
    trainer(tmp_path / "straight", seldom).train()
    trainer(tmp_path / "broken", seldom).train()
    assert lines(tmp_path / "broken") == lines(tmp_path / "straight")


def patchy(images: torch.Tensor, prompts: Sequence[str], references: Any) -> Reward:
    """Redness of the left half, decided there; what shows the prompt "1" was decided nowhere."""
    mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
    mask[:, :, : images.shape[3] // 2] = True
    mask[torch.tensor([text == "1" for text in prompts])] = False
    return Reward(redness(images[..., : images.shape[3] // 2], prompts, references), mask)


def constant(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
    return torch.zeros(len(images))


def test_groups_without_spread_are_left_out(tmp_path: Path) -> None:
    """Only one prompt is rewarded for what the image shows: the other groups take part in nothing, KL included."""

    def only_zero(images: torch.Tensor, prompts: Sequence[str], references: Any) -> torch.Tensor:
        return redness(images, prompts, references) * torch.tensor([float(text == "0") for text in prompts])

    config = replace(QUICK, iterations=4, middle=0, seed=1, loss=PolicyLossOptions(kl_weight=0.1))
    filtering = trainer(tmp_path / "filtering", config, only_zero)
    filtering.train()
    found = lines(tmp_path / "filtering")
    assert {line["groups_without_spread"] for line in found} <= {0.0, 0.5, 1.0}
    assert 0 < fmean(line["groups_without_spread"] for line in found) < 1
    assert all(line["gradient_norm"] == 0 for line in found if line["groups_without_spread"] == 1)
    still = trainer(tmp_path / "constant", config, constant)
    before = {k: v.clone() for k, v in still.policy.state_dict().items()}
    still.train()
    assert all(torch.equal(v, before[k]) for k, v in still.policy.state_dict().items())


@pytest.mark.parametrize("changes", [{"micro_batch": 3}, {"micro_batch": 1}, {"gradient_checkpointing": True}])
def test_what_saves_memory_does_not_change_gradients(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(QUICK, iterations=3, seed=2, loss=PolicyLossOptions(kl_weight=0.1), use_mask=True)
    plain = trainer(tmp_path / "plain", config, patchy).train()
    other = trainer(tmp_path / "other", replace(config, **changes), patchy).train()
    assert min(line["mask_share"] for line in lines(tmp_path / "plain")) == 0.5  # rows without a token to train
    for a, b in zip(lines(tmp_path / "plain"), lines(tmp_path / "other"), strict=True):
        shares = {k: v for k, v in a.items() if k.startswith("gradient_share")}  # no sums over parts
        assert b == pytest.approx({**a, **{k: b[k] for k in shares}}, rel=1e-3, abs=1e-5)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_several_updates_on_a_rollout(tmp_path: Path) -> None:
    """The first is on-policy; after large ones the ratio is clipped."""
    config = replace(QUICK, iterations=2, updates=4, learning_rate=3e-2)
    trainer(tmp_path, config).train()
    assert all(line["ratio"] != 1 and line["clip_fraction"] > 0 for line in lines(tmp_path))
    assert all(line["rollout_difference"] < 1e-4 for line in lines(tmp_path))


@pytest.mark.parametrize("updates", [1, 2])
def test_rollouts_of_another_policy_are_refused(updates: int, tmp_path: Path) -> None:
    """As when sampling and training do not run the same model; the message says by how much and where."""
    config = replace(QUICK, updates=updates, rescore=False, tolerance=math.inf if updates == 2 else 0.0)
    wrong = trainer(tmp_path, config)
    original = wrong.roll_out

    def drifted(*arguments: Any) -> Any:
        rollout = original(*arguments)
        log_probs = rollout.log_probs.clone()
        log_probs[:, 1:] += 0.3
        return rollout._replace(log_probs=log_probs)

    wrong.roll_out = drifted  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"differ by 0.2\d? on average \(tolerance 0.001\), 0.3 at scale 1"):
        wrong.train()


def test_bf16(tmp_path: Path) -> None:
    trainer(tmp_path, replace(QUICK, iterations=4, precision="bf16")).train()
    assert all(line["rollout_difference_mean"] < 3e-2 and line["ratio"] == 1 for line in lines(tmp_path))


def test_stops_at_a_large_kl(tmp_path: Path) -> None:
    config = replace(QUICK, iterations=40, learning_rate=3e-2, stop_kl=0.05, loss=PolicyLossOptions(kl_weight=1e-4))
    trainer(tmp_path, config).train()
    found = lines(tmp_path)
    assert len(found) < 40 and found[-1]["kl"] > 0.05 and all(line["kl"] <= 0.05 for line in found[:-1])
    trainer(tmp_path, config).train()  # called again it stays where it stopped
    assert lines(tmp_path) == found
    trainer(tmp_path, replace(config, stop_kl=1e3, iterations=len(found) + 1)).train()
    assert len(lines(tmp_path)) == len(found) + 1
    trainer(tmp_path / "constant", replace(config, iterations=2), constant).train()  # no update, no KL
    assert len(lines(tmp_path / "constant")) == 2


def test_evaluation_keeps_the_best_and_disturbs_nothing(tmp_path: Path) -> None:
    trainer(tmp_path / "without").train()
    config = replace(QUICK, evaluate_every=2, evaluation_samples=8)
    trainer(tmp_path / "with", config).train()
    found = lines(tmp_path / "with")
    assert [line["step"] for line in found if "evaluation/it" in line] == [0, 2, 4, 6]
    assert all(line["evaluation/diversity"] > 0 for line in found if "evaluation/it" in line)
    trained = [{k: v for k, v in line.items() if "evaluation" not in k} for line in found if line["step"]]
    assert trained == lines(tmp_path / "without")
    assert len(list((tmp_path / "with" / "pictures").iterdir())) == 4
    best = VAR.from_pretrained(tmp_path / "with" / "best")
    rewards = RewardSum({"it": redness})
    again = evaluate_policy(best, rewards, Prompts(PROMPTS), samples=8, options=config.rollout)
    assert again.metrics["return"] == pytest.approx(max(line.get("evaluation/return", -9) for line in found), abs=1e-5)


def test_adapters(tmp_path: Path) -> None:
    """Only they are trained; the reference is the model without them; what is saved is a plain model."""
    pytest.importorskip("peft")
    adapted = add_adapters(policy(), 4)
    frozen = {k: v.clone() for k, v in adapted.state_dict().items() if "lora" not in k}
    config = replace(QUICK, iterations=8, middle=0, learning_rate=1e-2, loss=PolicyLossOptions(kl_weight=0.01))
    training = VMRGRPOTrainer(adapted, RewardSum({"it": redness}), PROMPTS, config, tmp_path)
    assert training.reference is adapted
    averaged = training.train()
    assert all(torch.equal(v, adapted.state_dict()[k]) for k, v in frozen.items())
    found = lines(tmp_path)
    assert found[0]["kl"] == 0 and found[-1]["kl"] > 1e-4
    saved = VAR.from_pretrained(tmp_path / "model")
    tokens = torch.randint(saved.config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(0))
    inputs = saved.tokenizer.teacher_forcing(tokens)
    torch.testing.assert_close(saved(["1", "2"], inputs), averaged(["1", "2"], inputs))
    torch.testing.assert_close(saved(["1", "2"], inputs), training.ema.model(["1", "2"], inputs), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(saved(["1", "2"], inputs), policy()(["1", "2"], inputs), atol=1e-3)
    with without_adapters(adapted):
        assert torch.equal(adapted(["1", "2"], inputs), policy()(["1", "2"], inputs))
    assert any(p.requires_grad for p in adapted.parameters())
    with pytest.raises(ValueError, match="expected a model without adapters"):
        add_adapters(adapted, 4)


def test_what_is_saved_is_made_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights behind adapters go to the CPU one by one, never in a copy beside them; a tokenizer goes with them."""
    pytest.importorskip("peft")
    adapted = add_adapters(policy(), 2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    expected = merged(adapted)
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", Mock(side_effect=AssertionError("copied where it is")))
    found = plain(adapted)
    assert found.device.type == "cpu" and found.tokenizer is not adapted.tokenizer
    for model, other in ((found, expected), (found.tokenizer, adapted.tokenizer)):
        torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert not {p.data_ptr() for p in found.parameters()} & {p.data_ptr() for p in adapted.parameters()}
    assert plain(expected) is expected


def test_without_adapters_restores_what_was_there() -> None:
    """Nested, after an error, and with a half of the adapters that is not trained (LoRA-FA)."""
    pytest.importorskip("peft")
    inputs = (["1", "2"], policy().tokenizer.teacher_forcing(torch.zeros(2, 14, dtype=torch.int64)))
    plain, adapted = policy()(*inputs), add_adapters(policy(), 2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
            parameter.requires_grad_("lora_B" in name)
    trained = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    with pytest.raises(KeyError), without_adapters(adapted):
        with without_adapters(adapted):
            pass
        assert torch.equal(adapted(*inputs), plain)
        raise KeyError
    assert not torch.equal(adapted(*inputs), plain)
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == trained


def test_subject_driven(tmp_path: Path) -> None:
    """Rewards see the references of their prompts; the policy sees them as prefixes."""
    var = policy().add_subject()
    references = torch.rand(4, 3, *var.tokenizer.config.image_size, generator=torch.Generator().manual_seed(0))

    def likeness(images: torch.Tensor, prompts: Sequence[str], given: Any) -> torch.Tensor:
        owners = torch.tensor([PROMPTS.index(text) for text in prompts])
        assert torch.equal(given, references[owners])
        return -(images - given).square().mean((1, 2, 3))

    rewards = RewardSum({"likeness": likeness, "red": redness}, {"likeness": 2.0}, standardise=True)
    VMRGRPOTrainer(var, rewards, Prompts(PROMPTS, references=references), QUICK, tmp_path).train()
    assert all(line["rollout_difference"] < 1e-4 for line in lines(tmp_path))
    assert {"reward/likeness", "reward/red", "reward_std/red"} <= set(lines(tmp_path)[0])


def test_stopped_before_its_first_step(tmp_path: Path) -> None:
    """The evaluation before training is not in the log twice."""
    config = replace(QUICK, iterations=2, evaluate_every=2, evaluation_samples=8, save_every=100)
    first = trainer(tmp_path, config)

    def stopping(number: int) -> dict[str, float]:
        raise KeyboardInterrupt

    first.iteration = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert [line["step"] for line in lines(tmp_path)] == [0]
    trainer(tmp_path, config).train()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_interrupt_finishes_the_iteration_and_saves(tmp_path: Path) -> None:
    config = replace(QUICK, save_every=100, save_minutes=0.0)
    straight = trainer(tmp_path / "straight", config).train()
    first = trainer(tmp_path / "stopped", config)
    iteration = first.iteration

    def told(number: int) -> dict[str, float]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return iteration(number)

    first.iteration = told  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 3, saved in .*step-00000003"):
        first.train()
    resumed = trainer(tmp_path / "stopped", config).train()
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in straight.state_dict().items())


def test_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "due", lambda self: self.average.updates == 2)
    trainer(tmp_path, replace(QUICK, iterations=4, save_every=100, keep=9)).train()
    assert saved_steps(tmp_path) == [0, 2, 4] and RLConfig().save_minutes == 5


def test_going_on_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run goes on as if it had been meant for more iterations: the rate is constant."""
    straight = trainer(tmp_path / "straight").train()
    trainer(tmp_path / "longer", replace(QUICK, iterations=4)).train()
    longer = trainer(tmp_path / "longer").train()
    assert "goes on from step 4 to 6 instead of 4" in capsys.readouterr().err
    assert lines(tmp_path / "longer") == lines(tmp_path / "straight")
    assert all(torch.equal(value, longer.state_dict()[key]) for key, value in straight.state_dict().items())
    with pytest.raises(ValueError, match=r"train: iterations: expected at least 6, .*, got 5; .* with --no-resume"):
        trainer(tmp_path / "longer", replace(QUICK, iterations=5)).train()


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*arguments: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", taken)
    with pytest.raises(ValueError, match=r"train: output: .* is in use by another process"):
        trainer(tmp_path).train()


def test_precision_of_accelerate_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"train: precision: .*got bf16 there, no here"):
        trainer(tmp_path)


def test_images_are_let_go_before_the_update(tmp_path: Path) -> None:
    sizes = []
    watched = trainer(tmp_path, replace(QUICK, iterations=1))
    update = watched.update

    def looking(rollout: Any, *rest: Any) -> Any:
        sizes.append(rollout.images.untyped_storage().nbytes())
        return update(rollout, *rest)

    watched.update = looking  # type: ignore[method-assign]
    watched.train()
    assert sizes == [0]


def test_going_on_with_another_model_or_reward_is_refused(tmp_path: Path) -> None:
    """The KL is measured to the model that the run began with: a policy that has learned since is another one."""
    config = replace(QUICK, iterations=2, loss=PolicyLossOptions(kl_weight=0.1))
    first = trainer(tmp_path, config, ColourReward())
    first.train()
    again = VMRGRPOTrainer(first.policy, first.reward, PROMPTS, config, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(start was"):
        again.train()
    with pytest.raises(ValueError, match=r"other settings \(rewards.it.channel was 0, is 2"):
        trainer(tmp_path, config, ColourReward(channel="blue")).train()
    with pytest.raises(ValueError, match=r"other settings \(prompts was"):
        VMRGRPOTrainer(policy(), RewardSum({"it": ColourReward()}), ["0", "1", "3", "3"], config, tmp_path).train()
    path = tmp_path / "settings.json"
    begun = path.read_text()
    path.write_text(begun.replace('"seeds"', '"others"'))
    with pytest.raises(ValueError, match=r"other settings \(seeds was None, is sha256\)"):
        trainer(tmp_path, config, ColourReward()).train()
    path.write_text(begun)
    frugal = replace(
        config, micro_batch=1, gradient_checkpointing=True, rollout=SamplingOptions(batch_size=2), iterations=3
    )
    trainer(tmp_path, frugal, ColourReward()).train()  # what only needs less memory may change
    assert len(lines(tmp_path)) == 3
    trainer(tmp_path, replace(config, resume=False), ColourReward(channel="blue")).train()
    assert len(lines(tmp_path)) == 2


def test_evaluation_of_standardised_rewards_is_not_standardised(tmp_path: Path) -> None:
    """Or its mean would always be 0, and the best a matter of rounding."""
    config = replace(QUICK, evaluate_every=6, evaluation_samples=16, learning_rate=3e-3)
    rewards = RewardSum({"red": redness, "again": redness}, {"again": 0.5}, standardise=True)
    VMRGRPOTrainer(policy(), rewards, PROMPTS, config, tmp_path).train()
    for line in (lines(tmp_path)[0], lines(tmp_path)[-1]):
        assert line["evaluation/return"] == pytest.approx(1.5 * line["evaluation/red"], rel=1e-4)
    assert lines(tmp_path)[-1]["reward"] == pytest.approx(1.5 * lines(tmp_path)[-1]["reward/red"], rel=1e-4)


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected parameters that require a gradient, got none"):
        VMRGRPOTrainer(policy().requires_grad_(False), RewardSum({"it": redness}), PROMPTS, QUICK, tmp_path)
    with pytest.raises(ValueError, match="Prompts: texts: expected at least one"):
        VMRGRPOTrainer(policy(), RewardSum({"it": redness}), [], QUICK, tmp_path)
    with pytest.raises(ValueError, match="RLConfig: group_size: expected at least 2"):
        trainer(tmp_path, replace(QUICK, group_size=0))
    for change, message in (
        ({"middle": 3}, "RLConfig: middle: expected below 3, got 3"),
        ({"evaluation_samples": 4}, "evaluation_samples: expected at least 8"),
        ({"loss": PolicyLossOptions(kl_estimator="k4")}, "PolicyLossOptions: kl_estimator: expected one of"),
        ({"rollout": SamplingOptions(top_p=0.0)}, "SamplingOptions: top_p: expected above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, replace(QUICK, **change))
    trainer(tmp_path, replace(QUICK, iterations=1)).train()
    with pytest.raises(ValueError, match="coarse_updates, fine_updates: expected"):
        trainer(tmp_path, replace(QUICK, coarse_updates=0, fine_updates=0))
    with pytest.raises(ValueError, match=r"other settings \(rl.eta was 1.0, is 2.0"):
        trainer(tmp_path, replace(QUICK, eta=2.0)).train()
