"""Training of an Infinity: the loss by definition, the loop that VAR has too, resume, buckets, a tiny set learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from fastvar.data import TextImages
from fastvar.models import (
    CharacterTextEncoder,
    EncodedTexts,
    Infinity,
    InfinityConfig,
    bitwise_loss,
    encode_texts,
    scale_weights,
)
from fastvar.schedule import ScaleSchedule
from fastvar.training import InfinityTask, TrainConfig, train
from fastvar.training.log import read_metrics
from tests.data.test_text_images import write
from tests.helpers.tiny import SQUARES, tiny_bits

TALL = ScaleSchedule(((1, 1), (2, 1), (4, 2)))
TEXTS = ("red", "", "blue 日本", "green")


def infinity(**fields: Any) -> Infinity:
    torch.manual_seed(0)
    shape = {"depth": 2, "embed_dim": 32, "num_heads": 2, "pool_heads": 2, "bits": 8, "gate_init": 1.0}
    config = InfinityConfig(SQUARES, **{**shape, "text_channels": 12, "text_length": 9, **fields})
    return Infinity(config, tiny_bits(), CharacterTextEncoder(12, max_length=9))


class Pictures:
    """Noise with a text each."""

    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(4)
        self.images = torch.rand(count, 3, 6, 6, generator=generator) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "text": f"{index}"}


def options(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "batch_size": 4, "log_every": 1, "save_every": 1, **changes})


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl")]


def batch_of(count: int = 3) -> dict[str, Any]:
    data = Pictures(count)
    return {"image": data.images, "text": ["a", "", "bc"][:count]}


@pytest.mark.parametrize("weighted", [True, False])
def test_equals_the_definition(weighted: bool) -> None:
    """Cross-entropy over the two logits of each bit, flips and dropped texts left out."""
    net = infinity(condition_dropout=0.0)
    task, batch = InfinityTask(net, flip_strength=0.0, weighted=weighted), batch_of()
    loss, logged = task.loss(net, batch)
    quantized = net.tokenizer.quantize(batch["image"])
    logits = net(batch["text"], quantized.teacher_forcing)
    two = torch.stack([torch.zeros_like(logits), logits], -1)
    each = F.cross_entropy(two.flatten(0, 2), quantized.bits.long().flatten(), reduction="none").view(logits.shape)
    weights = scale_weights(net.schedule) if weighted else torch.full((14,), 1 / 14)
    torch.testing.assert_close(loss, (each.mean(2) * weights).sum(1).mean())
    right = (logits > 0) == quantized.bits
    torch.testing.assert_close(logged["bits_right"], right.float().mean())
    torch.testing.assert_close(logged["bits_right_coarsest"], right[:, :1].float().mean())
    torch.testing.assert_close(logged["bits_right_finest"], right[:, 5:].float().mean())


@pytest.mark.parametrize("own", [False, True], ids=["complete", "own tokens"])
def test_a_subject_is_read(own: bool) -> None:
    net = infinity(condition_dropout=0.0, subject_dropout=0.0).add_subject(own_tokens=own)
    task, batch = InfinityTask(net, flip_strength=0.0), batch_of()
    batch["reference"] = batch["image"].flip(0)
    quantized = net.tokenizer.quantize(batch["image"])
    tokens = net.tokenizer.encode(batch["reference"])
    subject = net.tokenizer.codes(tokens) if own else net.tokenizer.pyramid(tokens)
    logits = net(batch["text"], quantized.teacher_forcing, subject=subject)
    loss = bitwise_loss(logits, quantized.bits, scale_weights(net.schedule, logits.device))
    torch.testing.assert_close(task.loss(net, batch)[0], loss)
    with pytest.raises(ValueError, match="InfinityTask: data: expected references, as the model has a subject prefix"):
        task.check_data(Pictures())


def test_flips_and_dropped_texts() -> None:
    """Inputs and labels change with flips, drawn anew; with all texts dropped none is read."""
    net, batch = infinity(condition_dropout=0.0).train(), batch_of()
    found = [InfinityTask(net, flip_strength=s).loss(net, batch)[0].item() for s in (0.0, 0.0, 1.0, 1.0)]
    assert found[0] == found[1] and len(set(found)) == 3
    seen = []
    quantize = net.tokenizer.quantize
    net.tokenizer.quantize = lambda images, **more: seen.append(more) or quantize(images, **more)  # type: ignore
    for state in (1, None, 1):
        if state is not None:
            torch.manual_seed(state)
        InfinityTask(net, flip_strength=0.2, flip_scales=2).loss(net, batch)
    assert all(0 <= p <= 0.2 for p in seen[0]["flip_probability"]) and seen[0]["flip_probability"][2] == 0
    assert seen[0]["seed"] == seen[2]["seed"] != seen[1]["seed"]
    net = infinity(condition_dropout=1.0).train()
    task = InfinityTask(net, flip_strength=0.0)
    other = batch | {"text": ["x", "", "yz"]}
    assert torch.equal(task.loss(net, batch)[0], task.loss(net, other)[0])
    net.eval()
    assert not torch.equal(task.loss(net, batch)[0], task.loss(net, other)[0])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("buckets", [False, True])
def test_resume_is_bit_equal(buckets: bool, tmp_path: Path) -> None:
    """With flips, dropped texts, dropped paths, micro-batches, bfloat16 and blocks computed again; with images of two
    shapes."""
    data: Any = Pictures()
    if buckets:
        for number, text in enumerate((*TEXTS, "a", "b")):
            write(tmp_path / f"data/{number}.png", 12, 24 if number % 2 else 12, text, 40 * number)
        data = TextImages(tmp_path / "data", sizes=[(6, 6), (8, 4)])

    def task() -> InfinityTask:
        net = infinity(drop_path=0.2, condition_dropout=0.5)
        net.gradient_checkpointing = True
        return InfinityTask(net, schedules=[net.schedule, TALL] if buckets else None)

    config = options(precision="bf16", accumulate=2)
    straight = train(task(), data, config, tmp_path / "straight")
    stopping = task()
    begun, loss = 0, stopping.loss

    def stopped(*arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun > 5:
            raise Stopped
        return loss(*arguments)

    stopping.loss = stopped  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(stopping, data, config, tmp_path / "resumed")
    resumed = train(task(), data, config, tmp_path / "resumed")
    assert resumed.steps_run == 2 and losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_tiny_set_is_learned(tmp_path: Path) -> None:
    """Texts decide what is drawn; the model that is saved draws it too."""
    net = infinity(condition_dropout=0.0)
    data = Pictures(2)
    often = {"log_every": 120, "save_every": 120}
    config = options(steps=120, batch_size=2, learning_rate=1e-2, ema_decay=0.5, weight_decay=0.0, **often)
    result = train(InfinityTask(net, flip_strength=0.0), data, config, tmp_path)
    assert losses(tmp_path)[-1] < 0.1  # chance is 0.69
    saved = Infinity.from_pretrained(tmp_path / "model")
    saved.text_encoder = net.text_encoder
    bits = net.tokenizer.encode(data.images)
    for model in (result.model, saved):
        right = model.generate(["0", "1"], top_k=1).tokens == bits
        assert right.float().mean() > 0.9
        assert right.all(0)[bits[0] != bits[1]].float().mean() > 0.8  # which the text alone tells apart


def test_ratios_in_buckets(tmp_path: Path) -> None:
    """Images of two shapes by features that were kept; what was not encoded is named before the first step."""
    for number, text in enumerate(TEXTS):
        write(tmp_path / f"data/{number}.png", 12, 24 if number % 2 else 12, text, 60 * number)
    net = infinity()
    sizes = [net.tokenizer.config.image_size_of(schedule) for schedule in (net.schedule, TALL)]
    assert sizes == [(6, 6), (8, 4)]
    data = TextImages(tmp_path / "data", sizes=sizes)
    encode_texts(CharacterTextEncoder(12, max_length=9), TEXTS[1:], tmp_path / "texts")
    net.text_encoder = EncodedTexts(tmp_path / "texts")
    with pytest.raises(ValueError, match=r"EncodedTexts: texts: expected texts that were encoded .*, got 'red'"):
        train(InfinityTask(net, schedules=[net.schedule, TALL]), data, options(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    encode_texts(CharacterTextEncoder(12, max_length=9), TEXTS, tmp_path / "texts")
    net.text_encoder = EncodedTexts(tmp_path / "texts")
    task = InfinityTask(net, schedules=[net.schedule, TALL])
    seen, loss = [], task.loss
    task.loss = lambda model, batch: seen.append(batch["image"].shape[2:]) or loss(model, batch)  # type: ignore
    train(task, data, options(steps=8, batch_size=2), tmp_path / "run")
    assert set(seen) == {(6, 6), (8, 4)}
    with pytest.raises(
        ValueError, match=r"InfinityTask: data: expected images of \[\(6, 6\)\] pixels, got \[\(8, 4\)\]"
    ):
        train(InfinityTask(infinity()), data, options(), tmp_path / "other")
    with pytest.raises(ValueError, match=r"InfinityTask: data: expected images of \[\(6, 6\)\] pixels, got \(8, 4\)"):
        InfinityTask(net).loss(net, {"image": torch.zeros(1, 3, 8, 4), "text": ["red"]})


def test_what_does_not_fit() -> None:
    net = infinity()
    with pytest.raises(ValueError, match="self_correction: strength: expected 0 to 1, got 2"):
        InfinityTask(net, flip_strength=2)
    with pytest.raises(ValueError, match="InfinityTask: schedules: expected images of different sizes"):
        InfinityTask(net, schedules=[net.schedule, ScaleSchedule(((1, 1), (3, 3)))])
    for channels, longest in ((8, 9), (12, 10)):
        net.text_encoder = CharacterTextEncoder(channels, max_length=longest)
        expected = "of 12 channels and at most 9 rows, got characters"
        with pytest.raises(ValueError, match=f"InfinityTask: model: expected a text encoder {expected}-{channels} of"):
            InfinityTask(net)
    net.text_encoder = None
    with pytest.raises(RuntimeError, match="Infinity: text_encoder: none attached"):
        InfinityTask(net)


def test_processes_draw_flips_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for place in (0, 1, 1):
        monkeypatch.setattr(Accelerator, "process_index", place)
        task = InfinityTask(infinity())
        quantize = task.model.tokenizer.quantize
        seen: list[Any] = []
        task.model.tokenizer.quantize = lambda images, q=quantize, s=seen, **more: s.append(more) or q(images, **more)  # type: ignore
        train(task, Pictures(), options(steps=1, save_every=9), tmp_path / f"{len(drawn)}")
        drawn.append((seen[0]["seed"], seen[0]["flip_probability"]))
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1] and drawn[1] == drawn[2]


def test_torch_s_state_is_left_alone() -> None:
    net, before = infinity(), torch.get_rng_state()
    InfinityTask(net)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_is_not_resumed_with_other_flips(tmp_path: Path) -> None:
    train(InfinityTask(infinity()), Pictures(), options(steps=1), tmp_path)
    net = infinity()
    net.tokenizer.config = replace(net.tokenizer.config, next_input="area")
    net.text_encoder = CharacterTextEncoder(12, max_length=8)
    net.text_encoder.dtype = torch.bfloat16
    changes = ("tokenizer.next_input was bilinear, is area", "text_encoder.max_length was 9, is 8")
    expected = r"{}; {}; text_encoder.dtype was float32, is bfloat16".format(*changes)
    with pytest.raises(ValueError, match=expected):
        train(InfinityTask(net), Pictures(), options(steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"loss\.flip_strength was 0\.3, is 0\.1"):
        train(InfinityTask(infinity(), flip_strength=0.1), Pictures(), options(steps=1), tmp_path)
    with pytest.raises(ValueError, match="TrainConfig: graphs: expected False, as InfinityTask has no `tensors`"):
        train(InfinityTask(infinity()), Pictures(), options(graphs=True), tmp_path / "graphs")
