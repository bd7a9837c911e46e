"""Reinforcement learning of an Infinity: bits, texts of several lengths, subjects; continuations by the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from fastvar.cli import main
from fastvar.models import Infinity, SamplingOptions, state_after
from fastvar.models.kept_texts import KeptTexts
from fastvar.ops import PolicyLossOptions
from fastvar.rl import Prompts, RLConfig, Rollout, VMRGRPOTrainer, add_adapters, roll_out, segment_loss
from fastvar.rl.rewards import RewardSum
from fastvar.training.log import read_metrics
from tests.helpers.policies import bitwise_policy, policy, redness

TEXTS = ["a cat", "two dogs", "7"]
PROMPTS = Prompts(TEXTS)
G, PLAIN = 4, SamplingOptions()
KINDS: Any = pytest.mark.parametrize("kind", ["whole", "coarse", "fine"])
QUICK = RLConfig(iterations=4, prompts=2, group_size=4, learning_rate=1e-3, save_every=1, coarse_updates=1)


def rollout(model: Any, kind: Any, prompts: Prompts = PROMPTS, **changes: Any) -> Rollout:
    settings: dict[str, Any] = {"group_size": G, "seed": 3, "options": PLAIN, "middle": 2, "continuations": 2}
    return roll_out(model, prompts, segment=kind, **{**settings, **changes})


def with_references(model: Any, seed: int = 0) -> Prompts:
    size = (len(TEXTS), 3, *model.tokenizer.config.image_size)
    return Prompts(TEXTS, references=torch.rand(size, generator=torch.Generator().manual_seed(seed)))


def trainer(output: Path, config: RLConfig = QUICK, net: Any = None, **others: Any) -> VMRGRPOTrainer:
    return VMRGRPOTrainer(net or bitwise_policy(), RewardSum({"red": redness}), TEXTS, config, output, **others)


def lines(output: Path) -> list[dict[str, float]]:
    found = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "memory"))} for line in found]


@KINDS
@pytest.mark.parametrize("subject", ["none", "block_causal"])
@pytest.mark.parametrize("guidance", [None, (1.0, 3.0, 2.0)])
def test_log_probs_of_rollout_and_training_agree(kind: str, subject: str, guidance: Any) -> None:
    """Drawn scale by scale on a cache and on forks of it, with guidance of each scale; scored by teacher forcing."""
    net = bitwise_policy(subject=subject)
    prompts = PROMPTS if subject == "none" else with_references(net)
    options = SamplingOptions(guidance=guidance, top_p=0.9, temperature=0.8, batch_size=5)
    drawn = rollout(net, kind, prompts, options=options)
    assert drawn.tokens.dtype == torch.bool and drawn.conditions.lengths == (6,) * 4 + (9,) * 4 + (2,) * 4
    for rows in (None, [3, 4, 9]):
        found = segment_loss(net, drawn, torch.ones(12), PolicyLossOptions(), temperature=0.8, rows=rows)
        chosen = range(12) if rows is None else rows
        torch.testing.assert_close(found.log_probs, drawn.log_probs[list(chosen)], rtol=1e-4, atol=1e-4)
        assert found.ratio == 1 and found.clip_fraction == 0


@KINDS
def test_gradients_of_an_update(kind: str) -> None:
    """All of them against those of the objective written out on logits, in float64: a clipped ratio, the exact KL and
    the entropy of independent bits, a mask, weights of scales."""
    net, reference = (bitwise_policy(seed, subject="block_causal").double() for seed in (0, 1))
    for model in (net, reference):
        model.tokenizer.double()
    drawn = rollout(bitwise_policy(subject="block_causal"), kind, with_references(net))
    generator, temperature = torch.Generator().manual_seed(0), 0.7
    schedule = net.schedule.with_num_tokens(drawn.tokens.shape[1])
    gain = torch.randn(12, generator=generator, dtype=torch.float64)
    old = drawn.log_probs.double() + torch.randn(drawn.log_probs.shape, generator=generator).double()
    mask = torch.rand(old.shape, generator=generator).double().round()
    options = PolicyLossOptions(panw_alpha=0.4, clip_low=0.1, clip_high=0.3, kl_weight=0.2, entropy_weight=0.05)
    others = {"temperature": temperature, "reference": reference, "mask": mask, "old_log_probs": old}
    found = segment_loss(net, drawn, gain, options, **others)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    inputs = net.tokenizer.teacher_forcing(drawn.tokens).double()
    net.zero_grad()
    z = net(drawn.conditions, inputs, subject=drawn.subject) / temperature
    with torch.no_grad():
        other = reference(drawn.conditions, inputs, subject=drawn.subject) / temperature
    one, p = F.logsigmoid(z), z.sigmoid()
    log_probs = torch.where(drawn.tokens, one, F.logsigmoid(-z)).sum(-1)
    kl = (p * (one - F.logsigmoid(other)) + (1 - p) * (F.logsigmoid(-z) - F.logsigmoid(-other))).sum(-1)
    entropy = -(p * one + (1 - p) * F.logsigmoid(-z)).sum(-1)
    ratio = (log_probs - old).exp()
    surrogate = torch.minimum(ratio * gain[:, None], ratio.clamp(0.9, 1.3) * gain[:, None])
    weight = mask * torch.tensor([float(h * w) ** -0.4 for h, w in schedule for _ in range(h * w)], dtype=mask.dtype)
    weight[:, : schedule.starts[drawn.first_scale]] = 0
    loss = -(weight * (surrogate - 0.2 * kl + 0.05 * entropy)).sum() / weight.sum()
    loss.backward()
    torch.testing.assert_close(found.loss, loss)
    assert found.kl > 0.01 and found.clip_fraction > 0.1
    expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and len(expected) > 40
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_kl_to_itself_and_to_another(estimator: str) -> None:
    net = bitwise_policy()
    drawn, options = rollout(net, "whole"), PolicyLossOptions(kl_weight=0.1, kl_estimator=estimator)
    same = segment_loss(net, drawn, torch.ones(12), options, reference=bitwise_policy())
    other = segment_loss(net, drawn, torch.ones(12), options, reference=bitwise_policy(1))
    assert same.kl.abs() < 1e-6 and other.kl > 0.1


def test_guidance_of_each_scale_in_rollouts() -> None:
    """As `generate` takes it, of a VAR too; unconditional rows are counted where a scale has guidance."""
    for model, texts, plain, strong in (
        (bitwise_policy(), TEXTS, (1.0, 1.0, 1.0), (1.0, 2.0, 4.0)),
        (policy(), ["1", "2", "3"], (0.0, 0.0, 0.0), (0.5, 0.0, 3.0)),
    ):
        for guidance, rows in ((plain, 3), (strong, 6)):
            options = SamplingOptions(guidance=guidance)
            options.check()
            drawn = rollout(model, "whole", Prompts(texts), group_size=1, options=options)
            expected = model.generate(texts, seed=3, guidance=guidance)  # type: ignore[operator]
            assert torch.equal(drawn.tokens, expected.tokens) and drawn.passed_tokens == rows * 14
    assert json.loads(json.dumps(RLConfig(rollout=options).settings()))["rollout"]["guidance"] == [0.5, 0.0, 3.0]
    with pytest.raises(ValueError, match="SamplingOptions: guidance: expected each a number"):
        SamplingOptions(guidance=(1.0, "2")).check()  # type: ignore[arg-type]


def test_the_reward_rises(tmp_path: Path) -> None:
    """Of about 3 to nearly 4 in the last of ten iterations."""
    config = replace(QUICK, iterations=10, group_size=8, learning_rate=1e-2, save_every=10)
    trainer(tmp_path, config).train()
    rewards = [line["reward"] for line in lines(tmp_path)]
    assert fmean(rewards[-3:]) - fmean(rewards[:3]) > 0.5
    assert all(line["rollout_difference"] < 1e-4 for line in lines(tmp_path))


@pytest.mark.parametrize("adapters", [False, True])
def test_command_resumes_exactly(adapters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if adapters:
        pytest.importorskip("peft")
    net = bitwise_policy()
    net.config = replace(net.config, text_encoder="characters-16")
    net.save_pretrained(tmp_path / "policy")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    few = ["rl", "--model", "policy", "--prompt-file", "prompts.txt", "--rewards", "colour", "--learning-rate", "1e-3"]
    few += ["--prompts", "2", "--group-size", "2", "--middle", "1", "--coarse-updates", "1", "--device", "cpu"]
    few += ["--kl-weight", "0.1", "--continue-with", "reference", "--guidance", "1", "2", "3"]
    few += ["--adapter-rank", "2"] if adapters else ["--evaluate-every", "4", "--evaluation-samples", "8"]
    monkeypatch.chdir(tmp_path)
    main([*few, "--output", "straight", "--iterations", "4"])
    main([*few, "--output", "parts", "--iterations", "3"])
    main([*few, "--output", "parts", "--iterations", "4"])
    straight, parts = lines(tmp_path / "straight"), lines(tmp_path / "parts")
    assert straight[-1].items() <= parts[-1].items() and straight[-1]["kl"] > 0
    weights = [Infinity.from_pretrained(name).state_dict() for name in ("straight", "parts", "policy")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    name = "blocks.0.qkv.weight"
    assert not torch.equal(weights[0][name], weights[2][name])


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What else takes a model and prompts, with the encoder that is asked for."""
    monkeypatch.chdir(tmp_path)
    bitwise_policy().save_pretrained("policy")
    policy().save_pretrained("var")
    Path("prompts.txt").write_text("\n".join(TEXTS))
    prompts = ["--prompt-file", "prompts.txt", "--rewards", "colour"]
    asked = ["--model", "policy", "--text-encoder", "characters-16"]
    main(["evaluate", *asked, *prompts, "--samples", "8"])
    assert json.loads(capsys.readouterr().out)["rewards"]["images"] == 8
    draws = ["--prompt-count", "2", "--prefixes", "2", "--continuations", "2"]
    main(["choose-middle", *asked, *prompts, *draws])
    assert "<- recommended" in capsys.readouterr().out
    for given, message in (
        (
            [*asked, "--output", "x"],
            "prompt_file: expected a file, or --region-shares for numbers, as the model reads any text",
        ),
        (["--model", "policy", *prompts, "--output", "x"], "text_encoder: expected a name, as the model has none"),
        (["--model", "var", *asked[2:], "--output", "x"], "text_encoder: expected none with a VAR"),
    ):
        with pytest.raises(SystemExit):
            main(["rl", *given])
        assert message in capsys.readouterr().err


def test_bf16(tmp_path: Path) -> None:
    """Under autocast the loss takes the logits that tokens are drawn from: products of the head in float32."""
    trainer(tmp_path, replace(QUICK, precision="bf16")).train()
    assert all(line["rollout_difference_mean"] < 3e-2 and line["ratio"] == 1 for line in lines(tmp_path))
    net = bitwise_policy()
    hidden = torch.randn(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.scored(hidden).hidden, net.logits(hidden))


def test_texts_are_encoded_once_and_where_they_are_drawn(tmp_path: Path) -> None:
    """The trainer asks the encoder about each text once, a rollout about those of its rows; what is kept has an end."""
    net = bitwise_policy()
    encoder: Any = net.text_encoder
    asked: list[str] = []
    watched = Mock(wraps=encoder, side_effect=lambda texts: asked.extend(texts) or encoder(texts))
    watched.configure_mock(name=encoder.name, channels=16, max_length=12, dtype=torch.float32)
    net.text_encoder = watched
    whole, part = rollout(net, "fine"), rollout(net, "fine", rows=range(6, 12))
    assert asked == TEXTS + TEXTS[1:] and torch.equal(part.tokens, whole.tokens[6:])
    asked.clear()
    trainer(tmp_path, net=net).train()
    assert asked == TEXTS
    kept = KeptTexts(watched, most_bytes=9 * 16 * 4)
    for texts in (TEXTS, TEXTS[::-1], [TEXTS[1]] * 2):
        for one, two in zip(kept(texts), encoder(texts), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert asked[3:] == [*TEXTS, "two dogs", "a cat", "two dogs"]


def test_a_text_without_features_is_named_first(tmp_path: Path) -> None:
    net = bitwise_policy()
    net.text_encoder = None
    with pytest.raises(RuntimeError, match="Infinity: text_encoder: none attached"):
        trainer(tmp_path, net=net)


# -- continuations by the reference ----------------------------------------------------------------------------------

MODELS: Any = pytest.mark.parametrize("make", [policy, bitwise_policy])


def prompts_of(model: Any) -> Prompts:
    found = with_references(model)
    return replace(found, texts=["1", "2", "3"], labels=None)


@MODELS
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_the_reference_continues(make: Any, guidance: Any) -> None:
    """Equal to the policy it draws the same images; where the policy has moved its own are drawn from the tokens of the
    policy, each row alone too. Tokens that the reference takes in pass the network."""
    net, moved = (make(seed).add_subject() for seed in (0, 1))
    prompts, options = prompts_of(net), SamplingOptions(guidance=guidance, batch_size=10)
    own = rollout(net, "coarse", prompts, options=options)
    same = rollout(net, "coarse", prompts, options=options, continue_with=net.clone())
    for a, b in ((own.tokens, same.tokens), (own.log_probs, same.log_probs), (own.images, same.images)):
        assert torch.equal(a, b)
    assert same.passed_tokens - own.passed_tokens == 12 * 5 * (2 if guidance else 1)
    other = rollout(moved, "coarse", prompts, options=options, continue_with=net)
    plain = rollout(moved, "coarse", prompts, options=options)
    assert torch.equal(other.tokens, plain.tokens) and torch.equal(other.log_probs, plain.log_probs)
    assert not torch.equal(other.images, plain.images)
    part = rollout(moved, "coarse", prompts, options=options, continue_with=net, rows=range(3, 7))
    torch.testing.assert_close(part.images, other.images[6:14])
    state = state_after(net, prompts.texts, rollout(net, "whole", prompts, group_size=1).tokens[:, :5])
    assert state.scale == 2 and state.log_probs is None and state.cache.length == 5


@MODELS
def test_the_reference_may_be_the_policy_without_adapters(make: Any) -> None:
    pytest.importorskip("peft")
    plain, adapted = make(), add_adapters(make(), 2)
    prompts = Prompts(["1", "2", "3"])
    own = rollout(plain, "coarse", prompts)
    assert torch.equal(rollout(adapted, "coarse", prompts, continue_with=adapted).images, own.images)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    found = rollout(adapted, "coarse", prompts, continue_with=adapted)
    assert torch.equal(found.images, rollout(adapted, "coarse", prompts, continue_with=plain).images)
    assert not torch.equal(found.images, rollout(adapted, "coarse", prompts).images)


def test_continue_with_of_the_trainer(tmp_path: Path) -> None:
    """The reference is made without a KL too; only coarse segments have continuations; a run without the setting goes
    on as it was begun."""
    seen = {}
    for who in ("policy", "reference"):
        config = replace(QUICK, continue_with=who, iterations=1)
        training = trainer(tmp_path / who, config)
        assert (training.reference is not None) == (who == "reference")
        with torch.no_grad():
            for parameter in training.policy.parameters():
                parameter.mul_(1.3)
        seen[who] = [training.roll_out(iteration) for iteration in (0, 1)]
    (coarse, fine), (by_reference, as_before) = seen["policy"], seen["reference"]
    assert torch.equal(coarse.tokens, by_reference.tokens) and torch.equal(fine.images, as_before.images)
    assert not torch.equal(coarse.images, by_reference.images)
    for config in (replace(QUICK, middle=0), replace(QUICK, coarse_updates=0)):
        assert trainer(tmp_path / "none", replace(config, continue_with="reference")).reference is None
    assert "continue_with" not in RLConfig().settings()
    assert RLConfig(continue_with="reference").settings()["continue_with"] == "reference"
    with pytest.raises(ValueError, match="RLConfig: continue_with: expected one of"):
        replace(QUICK, continue_with="nobody").check()


def test_clear_errors_of_states() -> None:
    net = bitwise_policy()
    bits = torch.zeros(2, 5, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="state_after: prompts: expected one for each of 2, got 3"):
        state_after(net, TEXTS, bits)
    with pytest.raises(ValueError, match="num_tokens: expected one of"):
        state_after(net, TEXTS[:2], bits[:, :4])
