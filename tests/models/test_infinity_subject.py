"""An Infinity with the prefix of a reference subject: training, sampling and gradients of its second stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvar.models import Infinity, TextFeatures
from fastvar.models.infinity_block import rotations
from fastvar.ops import qk_norm_rope
from fastvar.schedule import ScaleSchedule
from tests.helpers.tiny import some_bits, some_texts, tiny_infinity

KINDS = ("block_causal", "bidirectional")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": 3.0, "top_p": 0.9},
    "guided hidden states": {"guidance": [1.0, 3.0, 1.0], "guidance_layer": 1},
}


def subjects(net: Infinity, count: int = 2) -> torch.Tensor:
    return net.tokenizer.pyramid(some_bits(net, count, seed=8))


def repeated(texts: TextFeatures, times: int) -> TextFeatures:
    return TextFeatures.joined([texts.some(slice(i // times, i // times + 1)) for i in range(times * 4)])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_log_probs_are_those_of_training(kind: str, settings: str) -> None:
    """From the start, and continued from a state, forked or not; where hidden states are mixed they are the mixture's,
    so that the bits drawn are compared."""
    net, texts, options = tiny_infinity(subject=kind), some_texts(), {"log_probs": True, **SETTINGS[settings]}
    subject = subjects(net)
    out = net.generate(texts, subject=subject, seed=1, **options)
    state = net.generate(texts, subject=subject, seed=1, stop=2, **options).state
    forked = net.generate(state=state.fork(3), seed=2, **options)
    assert torch.equal(net.generate(state=state, seed=1, **options).tokens, out.tokens)
    for found, several in ((out, 1), (forked, 3)):
        inputs = net.tokenizer.teacher_forcing(found.tokens)
        expected = net(repeated(texts, several), inputs, bits=found.tokens, subject=subject).log_probs
        if "guidance_layer" in options:  # of a scale without guidance the conditional model's
            end = net.schedule.ends[0]
            torch.testing.assert_close(found.log_probs[:, :end], expected[:, :end], rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(found.log_probs, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_contrasts_with_neither_text_nor_subject() -> None:
    net, texts = tiny_infinity(subject="block_causal"), some_texts()
    subject = subjects(net)
    out = net.generate(texts, subject=subject, guidance=2.0, top_k=1)
    inputs = net.tokenizer.teacher_forcing(out.tokens)
    own, opposite = net(texts, inputs, subject=subject), net(net.no_text(texts.lengths), inputs)
    assert torch.equal(out.tokens, 2 * own - opposite > 0)
    assert not torch.equal(out.tokens, own > 0)


@torch.no_grad()
def test_a_group_shares_its_subject() -> None:
    """Given once for two images or to each of them; another subject draws other images, in whatever place."""
    net, texts = tiny_infinity(subject="bidirectional"), repeated(some_texts(), 1)
    subject = subjects(net)
    options: dict[str, Any] = {"guidance": 2.0, "seed": 3}
    shared = net.generate(texts, subject=subject, **options).tokens
    assert torch.equal(shared, net.generate(texts, subject=subject.repeat_interleave(2, 0), **options).tokens)
    other = net.generate(texts, subject=subject.flip(0), **options).tokens
    plain = net.generate(texts, **options).tokens
    for tokens in (other, plain):
        assert (tokens != shared).any(2).any(1).all()
    alone = net.generate(texts.some(slice(2, 4)), subject=subject[1:], first_sample=2, **options).tokens
    assert torch.equal(alone, shared[2:])


@torch.no_grad()
def test_the_prefix_has_the_positions_of_its_own_grids() -> None:
    """The keys of the first block, by hand; of another schedule they are others."""
    net = tiny_infinity(subject="bidirectional")
    for schedule in (net.schedule, ScaleSchedule(((1, 1), (1, 2), (3, 4)))):
        subject = torch.randn(2, schedule.num_tokens, 8)
        block, told = net.blocks[0], net._subject_modulations(2)
        scale, shift = told.gates_and_norms()[1][0]
        x = net.code_embed(subject) + net.scale_embed(torch.tensor(schedule.scale_of_token)) + net.subject_embed
        h = torch.nn.functional.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = block.project(h)
        rope = rotations(schedule, 16, torch.device("cpu"))
        _, k = qk_norm_rope(q, k, log_scale=block.log_scale, rope=rope)
        prefix = net.prefill(subject, schedule=schedule)
        torch.testing.assert_close(prefix[0].k, k)
        torch.testing.assert_close(prefix[0].v, v)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_prefix_sees(kind: str) -> None:
    """Its own and the coarser scales of the prefix, or all of it."""
    net = tiny_infinity(subject=kind)
    subject, lengths = subjects(net).requires_grad_(), net.schedule.lengths
    for k, keys in enumerate(net.prefill(subject)[1].k.split(lengths, 1)):
        (gradient,) = torch.autograd.grad(keys.square().sum(), subject, retain_graph=True)
        for j, part in enumerate(gradient.split(lengths, 1)):
            assert bool(part.any()) == (j <= k or kind == "bidirectional")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_prefix(kind: str) -> None:
    """The subject's tokens, its own weights and those that both streams share; also where blocks are recomputed, to the
    bit, and in training, where subjects and texts are dropped."""
    net = tiny_infinity(subject=kind, subject_dropout=0.4, condition_dropout=0.4)
    bits, subject = some_bits(net, 4), subjects(net).requires_grad_()
    inputs = net.tokenizer.teacher_forcing(bits)

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(4)
        loss = -net(some_texts(), inputs, bits=bits, subject=subject).log_probs.mean()
        return torch.autograd.grad(loss, [subject, net.subject_embed, net.subject_text, *net.blocks.parameters()])

    first = run()
    assert (first[0].abs().amax(2) > 0).all() and all(gradient.any() for gradient in first[1:3])
    net.train()
    expected = run()
    assert not torch.equal(expected[1], first[1])
    net.gradient_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@torch.no_grad()
def test_adding_a_subject_keeps_the_model() -> None:
    plain = tiny_infinity()
    plain.text_encoder = encoder = object()
    net, texts = plain.add_subject("bidirectional"), some_texts()
    assert net.config.subject == "bidirectional" and net.text_encoder is encoder and net.tokenizer is plain.tokenizer
    inputs = net.tokenizer.teacher_forcing(some_bits(net, 4))
    assert torch.equal(net(texts, inputs), plain(texts, inputs))
    assert torch.equal(net.subject_text, plain.null_text[:1]) and net.subject_embed.any()
    assert not torch.equal(net(texts, inputs, subject=subjects(net)), plain(texts, inputs))
    assert not net.training and net.train().add_subject().training


@torch.no_grad()
def test_subjects_are_dropped_in_training() -> None:
    """By whole groups; half of their rows lose the text too."""
    net = tiny_infinity(subject="block_causal", subject_dropout=0.5, condition_dropout=0.0).train()
    texts = TextFeatures.joined([some_texts((3,))] * 64)
    inputs = net.tokenizer.teacher_forcing(some_bits(net, 1)).expand(64, -1, -1)
    subject = subjects(net, 1).expand(32, -1, -1)
    torch.manual_seed(0)
    rows = net(texts, inputs, subject=subject)[:, -1, 0]
    net.eval()
    one, few = texts.some(slice(0, 1)), inputs[:1]
    kept, lost, both = (
        found[:, -1, 0] for found in (net(one, few, subject=subject[:1]), net(one, few), net(net.no_text((3,)), few))
    )
    is_kept, is_lost, is_both = (torch.isclose(rows, each, rtol=1e-4, atol=1e-4) for each in (kept, lost, both))
    assert (is_kept | is_lost | is_both).all() and torch.equal(is_kept[::2], is_kept[1::2])
    assert 0.25 < is_kept.float().mean() < 0.75 and is_lost.any() and is_both.any()


def test_wrong_arguments() -> None:
    net, texts = tiny_infinity(subject="block_causal"), some_texts()
    subject = subjects(net, 3)
    inputs = net.tokenizer.teacher_forcing(some_bits(net, 4))
    uneven = "subject: expected a number of rows that divides 4, got 3"
    for message, call in [
        (
            f"^generate: {uneven}",
            lambda: net.generate(texts, subject=subject),
        ),
        (
            f"^Infinity: {uneven}",
            lambda: net(texts, inputs, subject=subject),
        ),
        (r"^Infinity: subject: expected \(R, 14, 8\), got", lambda: net(texts, inputs, subject=subject[:2, 1:])),
        (
            r"^Infinity: subject: this model has no subject prefix; see InfinityConfig.subject and add_subject",
            lambda: tiny_infinity().generate(texts, subject=subject[:1]),
        ),
        (r"^Infinity.add_subject: subject: expected .*, got \"none\"", lambda: net.add_subject("none")),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
