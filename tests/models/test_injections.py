"""The kinds of subject, of a VAR and of an Infinity: what sees what, and that sampling does what training does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.models import VAR, Infinity, Model, TextFeatures
from fastvar.models.injection import SUBJECTS
from fastvar.models.var_block import attend_to_scales
from fastvar.ops import PrefixKV
from fastvar.schedule import ScaleSchedule
from tests.helpers.tiny import some_bits, some_texts, some_tokens, tiny_bits, tiny_infinity, tiny_tokenizer, tiny_var

LABELS = torch.tensor([0, 3, 4, 1])
KINDS = SUBJECTS[1:]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=[tiny_var, tiny_infinity], ids=["VAR", "Infinity"])
def make(request: pytest.FixtureRequest) -> Any:
    """A model of some kind of subject."""
    return request.param


def prompts_of(model: Model, times: int = 1) -> Any:
    """Four, each several times."""
    rows = [row for row in range(4) for _ in range(times)]
    if isinstance(model, VAR):
        return LABELS[rows]
    texts = some_texts()
    return TextFeatures.joined([texts.some(slice(row, row + 1)) for row in rows])


def some_of(model: Model, count: int, seed: int = 3) -> torch.Tensor:
    """Tokens or bits."""
    return some_bits(model, count, seed) if isinstance(model, Infinity) else some_tokens(model, count, seed)


def log_probs(model: Model, tokens: torch.Tensor, subject: torch.Tensor | None) -> torch.Tensor:
    """Under teacher forcing, of rows of four prompts."""
    name = "bits" if isinstance(model, Infinity) else "tokens"
    inputs = model.tokenizer.teacher_forcing(tokens)
    return model(prompts_of(model, len(tokens) // 4), inputs, subject=subject, **{name: tokens}).log_probs


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True], ids=["complete", "own tokens"])
@every_kind
def test_sampling_agrees_with_training(make: Any, kind: str, own: bool) -> None:
    """Two rows a subject, guided; of a stopped state, and of its forks to the end."""
    model = make(subject=kind, subject_own_tokens=own)
    subject = model.pyramid(some_of(model, 2, seed=8))
    options = {"guidance": 2.0, "top_p": 0.9, "log_probs": True, "decode": False}
    coarse = model.generate(prompts_of(model), subject=subject, stop=2, seed=1, **options)
    torch.testing.assert_close(coarse.log_probs, log_probs(model, coarse.tokens, subject), rtol=0, atol=1e-4)
    out = model.generate(state=coarse.state.fork(2), seed=2, **options)
    expected = log_probs(model, out.tokens, subject)
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=1e-4)
    assert (log_probs(model, out.tokens, subject.flip(0)) - expected).abs().max() > 1e-2
    whole = model.generate(prompts_of(model), subject=subject, seed=1, **options)
    shared = model.generate(prompts_of(model), subject=subject.repeat_interleave(2, 0), seed=1, **options)
    assert torch.equal(whole.tokens, shared.tokens)
    torch.testing.assert_close(log_probs(model, whole.tokens, subject), whole.log_probs, rtol=0, atol=1e-4)


@every_kind
def test_what_an_image_sees_of_its_subject(make: Any, kind: str) -> None:
    """Each scale: all of it, the last scale, or the scales up to its own; with all scales and with the first two."""
    model = make(subject=kind)
    subject = model.pyramid(some_of(model, 2, seed=8)).requires_grad_()
    for scales in (2, 3):
        tokens = some_of(model, 4)[:, : model.schedule.ends[scales - 1]]
        inputs = model.tokenizer.teacher_forcing(tokens)
        hidden = model.hidden(prompts_of(model), inputs, subject=subject)
        for k, part in enumerate(hidden.split(model.schedule.lengths[:scales], 1)):
            (gradient,) = torch.autograd.grad(part[0].square().sum(), subject, retain_graph=True)
            assert not gradient[1].any()
            for j, seen in enumerate(gradient[0].split(model.schedule.lengths, 0)):
                expected = {"last_scale": j == 2, "interleaved": j <= k}.get(kind, True)
                assert (seen.abs().amax(1) > 0).all() if expected else not seen.any(), (k, j)


@every_kind
def test_what_a_subject_sees(make: Any, kind: str) -> None:
    """Its coarser scales and its own, all of them, or its last alone."""
    model = make(subject=kind)
    subject, lengths = model.pyramid(some_of(model, 2, seed=8)).requires_grad_(), model.schedule.lengths
    keys = model.prefill(subject)[1].k
    for k, part in enumerate(keys.split(lengths[-1:] if kind == "last_scale" else lengths, 1)):
        (gradient,) = torch.autograd.grad(part[0].square().sum(), subject, retain_graph=True)
        assert not gradient[1].any()
        for j, seen in enumerate(gradient[0].split(lengths, 0)):
            assert bool(seen.any()) == {"bidirectional": True, "last_scale": j == 2}.get(kind, j <= k)


@pytest.mark.parametrize("lengths", [None, (14, 0)])
@pytest.mark.parametrize("subjects", [1, 2, 4])
def test_interleaved_attention_is_that_of_its_mask(subjects: int, lengths: Any) -> None:
    """Results and gradients in float64, of images of the first two scales; with a subject that is dropped."""
    whole, schedule = ScaleSchedule((1, 2, 3)), ScaleSchedule((1, 2))
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 5)] * 3 + [(subjects, 14)] * 2
    q, k, v, prefix_k, prefix_v = leaves = [
        torch.randn(*shape, 2, 8, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    ]
    valid = None if lengths is None else torch.tensor(lengths[-subjects:] * (subjects // 2 or 1), dtype=torch.int32)
    block: Any = SimpleNamespace(normalise=lambda q, k, rope: (q, k), softmax_scale=0.3)
    found = attend_to_scales(schedule, PrefixKV(prefix_k, prefix_v, valid), by_scale=True)(block, q, k, v)

    keys, values = (
        torch.cat([shared.repeat_interleave(4 // subjects, 0), own], 1)
        for shared, own in ((prefix_k, k), (prefix_v, v))
    )
    scales = torch.tensor(schedule.scale_of_token)
    columns = torch.cat([torch.tensor(whole.scale_of_token), scales])
    seen = (columns <= scales[:, None]).expand(4, 1, -1, -1).clone()
    if valid is not None:
        seen[..., :14] &= (valid > 0).repeat_interleave(4 // subjects)[:, None, None, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * 0.3
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    torch.testing.assert_close(found, expected)
    slopes = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    gradients = (torch.autograd.grad(result, leaves, slopes) for result in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
@every_kind
def test_dropped_subjects_are_not_seen(make: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first of two groups, with all scales and with the first ones."""
    model = make(subject=kind)
    subject = model.pyramid(some_of(model, 2, seed=8))
    for scales in (1, 3):
        inputs = model.tokenizer.teacher_forcing(some_of(model, 4)[:, : model.schedule.ends[scales - 1]])
        without, with_it = (model.hidden(prompts_of(model), inputs, subject=given) for given in (None, subject))
        with monkeypatch.context() as patch:
            patch.setattr(model, "_dropped", lambda *_: (torch.tensor([False, True]), None))
            found = model.hidden(prompts_of(model), inputs, subject=subject)
        torch.testing.assert_close(found[:2], without[:2])
        torch.testing.assert_close(found[2:], with_it[2:])
        assert (with_it - without).abs().amax((1, 2)).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("patchify", [False, True])
def test_own_tokens_are_what_a_scale_adds(patchify: bool) -> None:
    """Of a tokenizer of one scale that is the complete feature map."""
    grids = ((2, 3),)
    for tokenizer in (tiny_bits(grids, bits=8, patchify=patchify), tiny_tokenizer(grids, residual_ratio=0.0)):
        is_bits = hasattr(tokenizer.config, "bits")
        tokens = some_bits(tokenizer, 2) if is_bits else some_tokens(tokenizer, 2)
        torch.testing.assert_close(tokenizer.codes(tokens), tokenizer.pyramid(tokens))


@torch.no_grad()
def test_pyramid_is_what_the_config_says(make: Any) -> None:
    complete, own = make(subject="block_causal"), make(subject="block_causal", subject_own_tokens=True)
    tokens = some_of(own, 2)
    assert torch.equal(complete.pyramid(tokens), complete.tokenizer.pyramid(tokens))
    assert torch.equal(own.pyramid(tokens), own.tokenizer.codes(tokens))
    assert own.pyramid(tokens).shape == complete.pyramid(tokens).shape
    assert not torch.equal(own.pyramid(tokens), complete.pyramid(tokens))
    assert own.add_subject("last_scale", own_tokens=True).config.subject_own_tokens
    assert not own.add_subject("last_scale").config.subject_own_tokens


@torch.no_grad()
def test_configs_from_before_the_fields(make: Any, tmp_path: Path) -> None:
    """They load as what they were; what is saved now has the kind and comes back with it."""
    model = make(subject="block_causal")
    model.save_pretrained(tmp_path / "before")
    path = tmp_path / "before/config.json"
    fields = json.loads(path.read_text())
    del fields["subject_own_tokens"]
    path.write_text(json.dumps(fields))
    before = type(model).from_pretrained(tmp_path / "before")
    tokens, subject = some_of(model, 4), model.pyramid(some_of(model, 2, seed=8))
    assert torch.equal(before.pyramid(some_of(model, 2, seed=8)), subject)
    assert torch.equal(log_probs(before, tokens, subject), log_probs(model, tokens, subject))
    changed = model.add_subject("interleaved", own_tokens=True)
    changed.save_pretrained(tmp_path / "after")
    after = type(model).from_pretrained(tmp_path / "after")
    assert after.config == changed.config
    assert torch.equal(log_probs(after, tokens, subject), log_probs(changed, tokens, subject))
    assert not torch.equal(log_probs(after, tokens, subject), log_probs(model, tokens, subject))
