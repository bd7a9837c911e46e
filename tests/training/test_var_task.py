"""The loss of VARTask: PyTorch's cross-entropy of the model's logits."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from fastvar.models import VAR, VARConfig, VQTokenizer, VQTokenizerConfig
from fastvar.training import TokenDataset, TrainConfig, TrainResult, VARTask, train
from fastvar.training.settings import check_same_settings

GRIDS = ((1, 1), (2, 2), (3, 3))


def model() -> VAR:
    torch.manual_seed(0)
    sizes = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 4}
    tokenizer = VQTokenizer(VQTokenizerConfig(grids=GRIDS, vocab_size=16, code_channels=4, **sizes))
    config = VARConfig(grids=GRIDS, depth=1, embed_dim=16, num_heads=2, vocab_size=16, code_channels=4, num_classes=3)
    var = VAR(replace(config, condition_dropout=0.0, gate_init=1.0), tokenizer)
    torch.nn.init.normal_(var.head.weight)
    return var


@dataclass
class Classes:
    """A data set that names its classes."""

    classes: list[str]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(3, 6, 6), "label": torch.tensor(index)}


def test_the_model_of_a_result_has_its_type() -> None:
    hints = get_type_hints(train, localns={"Image": object})
    assert get_args(hints["return"]) == get_args(hints["task"]) and get_origin(hints["return"]) is TrainResult
    assert get_type_hints(TrainResult)["model"] == get_args(hints["return"])[0]


def test_other_classes_are_refused_at_the_start(tmp_path: Path) -> None:
    var = model()
    task = VARTask(var)
    with pytest.raises(ValueError, match="VARTask: model: expected 4 classes, as the data has, got 3"):
        train(task, Classes(["a", "b", "c", "d"]), TrainConfig(steps=1), tmp_path)
    task.check_data(Classes(["a", "b", "c"]))
    cached = TokenDataset(Classes(["a", "b", "c", "d"]), var.tokenizer)
    with pytest.raises(ValueError, match="expected 4 classes, as the data has, got 3"):
        task.check_data(cached)
    var.config = replace(var.config, class_names=("a", "c", "b"))
    task.check_data(Classes(["a", "c", "b"]))
    with pytest.raises(ValueError, match=r"VARTask: model: .* in their order, got 'c' where the data has 'b'; ImageF"):
        task.check_data(Classes(["a", "b", "c"]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale_weights", [None, (1.0, 0.5, 0.0)])
def test_equals_pytorch(scale_weights: tuple[float, ...] | None, smoothing: float) -> None:
    var = model()
    tokens, labels = torch.randint(16, (5, 14)), torch.arange(5) % 3
    task = VARTask(var, label_smoothing=smoothing, scale_weights=scale_weights)
    loss, logged = task.loss(var, {"tokens": tokens, "label": labels})
    logits = var(labels, var.tokenizer.teacher_forcing(tokens))
    each = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=smoothing)
    each = each.view(tokens.shape)
    counts = torch.ones(14) if scale_weights is None else torch.tensor(scale_weights)[var.scale_index]
    expected = (each * counts).sum() / (5 * counts.sum())
    torch.testing.assert_close(loss, expected)
    gradient, wanted = (torch.autograd.grad(value, var.head.weight)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(logged["loss_coarsest"], each[:, :1].detach().mean())
    torch.testing.assert_close(logged["loss_finest"], each[:, 5:].detach().mean())
    torch.testing.assert_close(
        logged["entropy"], -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean().detach()
    )


def test_wrong_number_of_weights() -> None:
    with pytest.raises(ValueError, match="VARTask: scale_weights: expected 3 numbers, one for each scale, got 2"):
        VARTask(model(), scale_weights=(1.0, 2.0))


def test_options_that_do_not_go_together() -> None:
    var, labels, tokens = model(), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 14, dtype=torch.int64)
    inputs = var.tokenizer.teacher_forcing(tokens)
    for options in ({"label_smoothing": 0.1}, {"tokens": tokens, "token_weights": torch.ones(14)}):
        with pytest.raises(ValueError, match=r"VAR: (label_smoothing|token_weights): expected None"):
            var(labels, inputs, **options)
    with pytest.raises(ValueError, match="VAR: label_smoothing: expected None"):
        var(labels, inputs, tokens=tokens, label_smoothing=0.0, temperature=0.5)


@pytest.mark.parametrize("own", [False, True], ids=["complete", "own tokens"])
def test_a_subject_is_read(own: bool) -> None:
    var = model().add_subject("interleaved", own_tokens=own).eval()
    labels, (tokens, reference) = torch.tensor([0, 2]), torch.randint(16, (2, 2, var.schedule.num_tokens))
    subject = var.tokenizer.codes(reference) if own else var.tokenizer.pyramid(reference)
    inputs = var.tokenizer.teacher_forcing(tokens)
    expected = var(labels, inputs, subject=subject, tokens=tokens, label_smoothing=0.0).loss
    loss, _ = VARTask(var).loss(var, {"tokens": tokens, "reference_tokens": reference, "label": labels})
    torch.testing.assert_close(loss, expected)


def test_a_run_is_not_resumed_with_another_loss(tmp_path: Path) -> None:
    settings = {name: dict(VARTask(model(), label_smoothing=e).identity) for name, e in (("a", 0.0), ("b", 0.1))}
    path = tmp_path / "settings.json"
    for name, other in (("a", "b"), ("b", "a")):
        path.write_text(json.dumps(settings[name]))
        check_same_settings(path, settings[name])
        with pytest.raises(ValueError, match=r"loss\.label_smoothing was"):
            check_same_settings(path, settings[other])
    path.write_text(json.dumps({"tokenizer": settings["a"]["tokenizer"]}))  # of before there was a choice
    check_same_settings(path, settings["a"])
    path.write_text(json.dumps({"model": {"depth": 2}, "data": {"items": 3}}))  # of before models kept names of classes
    now = {
        "model": {"depth": 2, "class_names": [], "subject_own_tokens": False},
        "data": {"items": 3, "num_classes": 4},
    }
    check_same_settings(path, now)
    with pytest.raises(ValueError, match=r"model\.class_names was None, is \['cat'\]"):
        check_same_settings(path, now | {"model": {"depth": 2, "class_names": ["cat"]}})
    with pytest.raises(ValueError, match=r"model\.rate was None, is 0\.0"):  # a number is a choice
        check_same_settings(path, now | {"model": {"depth": 2, "rate": 0.0}})
