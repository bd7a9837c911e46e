"""The VAR in teacher forcing: who sees whom, groups that share a subject, conditions of both kinds, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvar.models import VAR, VARConfig
from tests.helpers.tiny import CHANNELS, RECTANGLES, SQUARES, some_subjects, some_tokens, tiny_tokenizer, tiny_var

SUBJECTS = ("block_causal", "bidirectional")


def batch_of(var: VAR, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, and inputs of teacher forcing."""
    return torch.arange(count) % 5, var.tokenizer.teacher_forcing(some_tokens(var, count))


@pytest.mark.parametrize("grids", [SQUARES, RECTANGLES], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"shared_adaln": True, "qk_l2_norm": False}, {"subject": "block_causal"}], ids=str
)
def test_a_scale_sees_the_scales_up_to_its_own(grids: Any, fields: dict[str, Any]) -> None:
    """The gradient of a scale's logits with respect to the inputs of each scale."""
    var = tiny_var(grids, **fields)
    labels, inputs = batch_of(var, 2)
    subject = some_subjects(var, 1).requires_grad_() if "subject" in fields else None
    inputs.requires_grad_()
    logits = var(labels, inputs, subject=subject)
    assert logits.shape == (2, var.schedule.num_tokens, 32) and logits.dtype == torch.float32
    lengths = var.schedule.lengths
    for k, scale_logits in enumerate(logits.split(lengths, 1)):
        wanted = [inputs] if subject is None else [inputs, subject]
        found = torch.autograd.grad(scale_logits.square().sum(), wanted, retain_graph=True)
        for j, part in enumerate(found[0].split(lengths[1:], 1), 1):
            reached = part.abs().amin((0, 2)) > 0
            assert reached.all() if j <= k else not part.any()
        if subject is not None:
            assert (found[1].abs().amax(2) > 0).all(), "every token of the subject is seen from every scale"


@pytest.mark.parametrize("kind", SUBJECTS)
def test_what_the_prefix_sees(kind: str) -> None:
    """A prefix token sees its own and the coarser scales of the prefix, or all of it; the first layer only itself."""
    var = tiny_var(subject=kind)
    subject = some_subjects(var, 2).requires_grad_()
    prefix = var.prefill(subject)
    lengths = var.schedule.lengths
    for k, keys in enumerate(prefix[1].k.split(lengths, 1)):
        (gradient,) = torch.autograd.grad(keys.square().sum(), subject, retain_graph=True)
        for j, part in enumerate(gradient.split(lengths, 1)):
            assert bool(part.any()) == (j <= k or kind == "bidirectional")
    for row in range(2):
        (gradient,) = torch.autograd.grad(prefix[1].v[row].square().sum(), subject, retain_graph=True)
        assert not gradient[1 - row].any()


def test_the_first_scales_alone() -> None:
    var = tiny_var()
    labels, inputs = batch_of(var, 3)
    whole = var(labels, inputs)
    for end in var.schedule.ends:
        torch.testing.assert_close(var(labels, inputs[:, : end - 1]), whole[:, :end], rtol=1e-5, atol=1e-5)


def test_log_probs_are_those_of_the_logits() -> None:
    var = tiny_var()
    labels, inputs = batch_of(var, 3)
    tokens = some_tokens(var, 3)
    logits = var(labels, inputs)
    found = var(labels, inputs, tokens=tokens)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found.log_probs, expected.gather(2, tokens[..., None])[..., 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-5)


def test_empty_batch() -> None:
    var = tiny_var(subject="block_causal").train()
    labels, inputs = batch_of(var, 0)
    found = var(labels, inputs, subject=some_subjects(var, 0), tokens=some_tokens(var, 0))
    assert found.log_probs.shape == (0, 14)
    found.log_probs.sum().backward()
    assert var.head.weight.grad is not None


@pytest.mark.parametrize("kind", SUBJECTS)
def test_a_group_shares_its_subject(kind: str) -> None:
    """Given once for G rows it does what it does given to every row, gradients included."""
    var = tiny_var(subject=kind)
    labels, inputs = batch_of(var, 6)
    subject = some_subjects(var, 2)
    parameters = list(var.parameters())

    def run(subject: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        logits = var(labels, inputs, subject=subject)
        return logits.detach(), torch.autograd.grad(logits.square().mean(), parameters)

    (logits, gradients), (expected, expected_gradients) = run(subject), run(subject.repeat_interleave(3, 0))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for (name, _), a, b in zip(var.named_parameters(), gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
        assert name.endswith("class_embed.weight") or a.any(), f"{name} has no gradient"
    swapped, _ = run(subject.flip(0))
    assert (swapped - expected).abs().amax((1, 2)).min() > 1e-3


def test_add_subject() -> None:
    base = tiny_var()
    labels, inputs = batch_of(base, 2)
    for kind in SUBJECTS:
        var = base.add_subject(kind)
        assert torch.equal(var(labels, inputs), base(labels, inputs))
        assert torch.equal(var.subject_condition, base.class_embed.weight[-1])
        assert var.tokenizer is base.tokenizer and not var.training and base.config.subject == "none"
        assert torch.isfinite(var(labels, inputs, subject=some_subjects(var, 1))).all()
        var.head.weight.data.zero_()
        assert base.head.weight.any()
    assert base.train().add_subject().training
    with pytest.raises(ValueError, match=r'add_subject: subject: expected .* got "none"'):
        base.add_subject("none")
    with pytest.raises(ValueError, match="VARConfig: subject: expected"):
        base.add_subject("causal")


def test_add_subject_to_a_model_that_has_one() -> None:
    base = tiny_var(subject="block_causal")
    changed = base.add_subject("bidirectional")
    assert changed.config.subject == "bidirectional"
    for name, tensor in changed.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]), name


def test_text_condition() -> None:
    var = tiny_var(num_classes=0, text_length=3, alphabet="abc")
    _, inputs = batch_of(var, 3)
    texts = ["a", "cb", ""]
    indices = torch.tensor([[0, 3, 3], [2, 1, 3], [3, 3, 3]])
    assert torch.equal(var.config.encode_text(texts), indices)
    logits = var(texts, inputs)
    assert torch.equal(logits, var(indices, inputs))
    assert (logits - var(["a", "bc", ""], inputs)).abs().amax((1, 2)).gt(1e-3).tolist() == [False, True, False]


def wrong_calls() -> dict[str, tuple[str, Callable[[VAR, torch.Tensor, torch.Tensor], Any]]]:
    """Name to (the message, a call with labels (2,) and inputs (2, 13, C) of a model of 14 tokens)."""
    subject = torch.zeros(2, 14, CHANNELS)
    return {
        "too few labels": (r"labels: expected one per row of inputs \(2\), got 1", lambda v, y, x: v(y[:1], x)),
        "labels (B, 1)": (r"labels: expected class indices \(B,\), got \(2, 1\)", lambda v, y, x: v(y[:, None], x)),
        "float labels": ("labels: expected int64 or int32, got torch.float32", lambda v, y, x: v(y.float(), x)),
        "a large label": ("labels: expected indices from 0 to 4, got 0 to 5", lambda v, y, x: v(y * 5, x)),
        "a negative label": ("labels: expected indices from 0 to 4, got -1 to 0", lambda v, y, x: v(-y, x)),
        "texts": ("labels: expected a tensor of class indices", lambda v, y, x: v(["1", "2"], x)),
        "between scales": (r"inputs: expected \(B, n, 8\) with n one of 0, 4, 13", lambda v, y, x: v(y, x[:, :5])),
        "too long": ("inputs: expected", lambda v, y, x: v(y, torch.cat([x, x], 1))),
        "channels": (r"inputs: expected .*, got \(2, 13, 7\)", lambda v, y, x: v(y, x[..., :7])),
        "flat": ("inputs: expected", lambda v, y, x: v(y, x[0])),
        "subject length": (
            r"subject: expected \(R, 14, 8\), got \(2, 13, 8\)",
            lambda v, y, x: v(y, x, subject=subject[:, 1:]),
        ),
        "subject channels": ("subject: expected", lambda v, y, x: v(y, x, subject=subject[..., 1:])),
        "subject rows": (
            "subject: expected a number of rows that divides 2, got 3",
            lambda v, y, x: v(y, x, subject=subject[[0, 0, 0]]),
        ),
        "no subject rows": ("subject: expected .* divides 2, got 0", lambda v, y, x: v(y, x, subject=subject[:0])),
        "subject flat": ("subject: expected", lambda v, y, x: v(y, x, subject=subject[0, :2])),
        "tokens": ("tokens: expected shape", lambda v, y, x: v(y, x, tokens=torch.zeros(2, 13, dtype=torch.int64))),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_wrong_arguments(name: str) -> None:
    message, call = wrong_calls()[name]
    var = tiny_var(subject="block_causal")
    with pytest.raises(ValueError, match=message):
        call(var, torch.tensor([0, 1]), torch.zeros(2, 13, CHANNELS))


def test_wrong_condition() -> None:
    with pytest.raises(ValueError, match=r"subject: this model has no subject prefix; see .* add_subject"):
        tiny_var()(torch.tensor([0]), torch.zeros(1, 13, CHANNELS), subject=torch.zeros(1, 14, CHANNELS))
    var, inputs = tiny_var(num_classes=0, text_length=2), torch.zeros(1, 13, CHANNELS)
    for labels, message in [
        (["123"], "expected texts of at most 2 characters out of '0123456789', got '123'"),
        (["1a"], "expected texts .* got '1a'"),
        ("12", "expected a list of texts, got the text '12'"),
        (torch.tensor([1]), r"expected texts or characters \(B, 2\), got \(1,\)"),
        (torch.tensor([[1, 11]]), "expected indices from 0 to 10, got 1 to 11"),
    ]:
        with pytest.raises(ValueError, match=f"VAR: labels: {message}"):
            var(labels, inputs)


def test_class_names(tmp_path: Path) -> None:
    """They are kept in the model and stand for indices; what would be "no condition" is no class."""
    tiny_var(class_names=["cat", "dog", "1", "owl", "ant"]).save_pretrained(tmp_path)
    var = VAR.from_pretrained(tmp_path)
    assert var.config.class_names == ("cat", "dog", "1", "owl", "ant")
    assert torch.equal(var.generate(["owl", "1"]).tokens, var.generate(torch.tensor([3, 2])).tokens)
    assert [var.config.class_index(label) for label in ("owl", "1", "0", "4")] == [3, 2, 0, 4]
    for label in ("5", "-1", "²", "bird", "1.0"):
        with pytest.raises(ValueError, match=f"expected one of 'cat', .* or a class index from 0 to 4, got '{label}'"):
            var.config.class_index(label)
    for labels, message in (
        (["cat", "3"], "expected class names out of 'cat', 'dog', '1', 'owl', 'ant', got '3'"),
        ("cat", "expected a list of class names, got the text 'cat'"),
        (torch.tensor([5]), "expected indices from 0 to 4, got 5 to 5"),
    ):
        with pytest.raises(ValueError, match=f"VAR: labels: {message}"):
            var.generate(labels)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("num_heads: expected a divisor of embed_dim 32, got 3", {"num_heads": 3}),
        ("subject: expected", {"subject": "yes"}),
        ("num_classes, text_length: expected exactly one", {"num_classes": 0}),
        ("num_classes, text_length: expected exactly one", {"text_length": 2}),
        (r"drop_path: expected at least 0 and below 1, got 1.0", {"drop_path": 1.0}),
        ("condition_dropout: expected", {"condition_dropout": 1.5}),
        ("subject_dropout: expected", {"subject_dropout": -0.1}),
        ("class_names: expected 5 different ones, .* got 1: 'a'", {"class_names": ["a"]}),
        ("class_names: expected 5 different ones, .* got 5: 'a'", {"class_names": ["a", "b", "c", "d", "a"]}),
    ],
)
def test_wrong_config(message: str, fields: dict[str, Any]) -> None:
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    with pytest.raises(ValueError, match=f"VARConfig: {message}"):
        VARConfig(**{**shape, **fields})


def test_the_tokenizer_is_no_submodule() -> None:
    var = tiny_var()
    tokenizer = var.tokenizer
    assert all(p is not q for p in var.parameters() for q in tokenizer.parameters())
    assert not any("tokenizer" in name or "codebook" in name for name in var.state_dict())
    var.to(torch.bfloat16)
    assert var.head.weight.dtype == torch.bfloat16 and tokenizer.codebook.dtype == torch.float32
    assert var.train() and not tokenizer.training
    var.to("meta")
    assert tokenizer.codebook.device.type == "meta" and var.tokenizer is tokenizer
    var.tokenizer = other = tiny_tokenizer(seed=2)
    assert var.tokenizer is other and other.codebook.device.type == "meta"


def test_a_tokenizer_that_does_not_fit() -> None:
    var = tiny_var()
    with pytest.raises(ValueError, match=r"VAR: tokenizer: expected grids \(\(1, 1\), .*, got \(\(1, 2\), \(2, 3\)\)"):
        var.tokenizer = tiny_tokenizer(RECTANGLES)
    for name, size in (("vocab_size", 16), ("code_channels", 4)):
        with pytest.raises(ValueError, match=f"VAR: tokenizer: expected {name} {size}, got"):
            VAR(VARConfig(**{**vars(var.config), name: size}), var.tokenizer)
    with pytest.raises(RuntimeError, match="VAR: tokenizer: none attached"):
        VAR(var.config).generate(torch.tensor([0]))


def test_layers_can_be_wrapped() -> None:
    """As LoRA wraps them: every linear layer of a block is called as a module, and what a wrapper adds counts."""

    class Wrapped(torch.nn.Module):
        def __init__(self, base: torch.nn.Module, delta: float) -> None:
            super().__init__()
            self.base, self.delta, self.calls = base, delta, 0

        def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            self.calls += 1
            return self.base(x, *args, **options) + self.delta

    plain = tiny_var()
    inputs = torch.randn(2, plain.schedule.num_tokens - plain.schedule.lengths[0], plain.config.code_channels)
    with torch.no_grad():
        expected = plain(torch.tensor([0, 1]), inputs)
    for name in ("qkv", "proj", "mlp_in", "mlp_out"):
        for delta in (0.0, 0.1):
            var = tiny_var()
            wrapped = Wrapped(getattr(var.blocks[0], name), delta)
            setattr(var.blocks[0], name, wrapped)
            with torch.no_grad():
                found = var(torch.tensor([0, 1]), inputs)
                var.generate(torch.tensor([0, 1]))
            assert wrapped.calls == 1 + len(var.schedule)
            assert torch.allclose(found, expected, atol=1e-5) == (delta == 0), name


@pytest.mark.parametrize("pinned", [False, True])
def test_pinned_labels_are_copied_at_once(monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    """Their owner may change them after the call; of other memory the copy does not wait for the device."""
    var, asked, to = tiny_var(), [], torch.Tensor.to
    monkeypatch.setattr(VAR, "device", torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: (asked.append(k.get("non_blocking")), to(*a, **k))[1])
    var.indices(torch.tensor([1, 2]))
    assert asked == [not pinned]
