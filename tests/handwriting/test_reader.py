"""The reader: accuracy on held-out scans, robustness, calibration, garbage, boxes, errors. Seeds are fixed."""

import time

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from fastvar.data import word_accuracy
from fastvar.handwriting import HandwritingScenes, Reader
from fastvar.handwriting.characters import JUNK, NUM_FEATURES, CharacterClassifier, gradient_features
from fastvar.handwriting.reader import degrade, trained_characters
from fastvar.handwriting.segmentation import segment


@pytest.fixture(scope="module")
def reader():
    return Reader()


def held_out(length, digits=2, split="test", **options):
    batch = HandwritingScenes(length=length, digits=digits, split=split, seed=11, **options).batch(range(length))
    return (batch["image"] + 1) / 2, batch


# (split, digits, size) and the least accuracy; measured: 0.995, 0.98, 0.975, 0.99, 0.99.
@pytest.mark.parametrize(
    ("split", "digits", "size", "least"),
    [
        ("test", 2, (32, 32), 0.97),
        ("train", 2, (32, 32), 0.97),
        ("test", 3, (32, 32), 0.95),
        ("test", 3, (64, 64), 0.97),
        ("test", 6, (32, 128), 0.97),
    ],
)
def test_scenes_of_unseen_scans_are_read_exactly(reader, split, digits, size, least):
    images, batch = held_out(1500 if size == (32, 32) else 500, digits, split, size=size)
    readings = reader(images)
    assert word_accuracy(readings, batch["text"]) >= least
    boxes = [
        (reading.boxes - truth).abs().max().item()
        for reading, truth, text in zip(readings, batch["boxes"], batch["text"], strict=True)
        if len(reading.text) == len(text)
    ]
    assert np.mean(boxes) < 1.5


@pytest.mark.parametrize(("sigma", "least"), [(0.6, 0.97), (0.8, 0.96), (1.0, 0.94)])
def test_mild_blur_is_read(reader, sigma, least):
    from torchvision.transforms.v2.functional import gaussian_blur

    images, batch = held_out(1000)
    readings = reader(gaussian_blur(images, [7, 7], [sigma, sigma]))
    assert word_accuracy(readings, batch["text"]) >= least


def test_degraded_scenes_are_read_with_less_confidence(reader):
    images, batch = held_out(1000)
    clean, degraded = reader(images), reader(degrade(images, torch.Generator().manual_seed(0)))
    assert word_accuracy(degraded, batch["text"]) >= 0.96
    means = [np.mean([reading.word_confidence for reading in readings]) for readings in (clean, degraded)]
    assert means[0] > means[1] > 0.8


def test_confidences_are_calibrated(reader):
    """Among characters read with confidence about c, about a share c is right."""
    images, batch = held_out(1500, digits=3)
    readings = reader(degrade(images, torch.Generator().manual_seed(0)))
    confidence, right = [], []
    for reading, text in zip(readings, batch["text"], strict=True):
        if len(reading.text) == len(text):
            confidence += reading.confidences.tolist()
            right += [a == b for a, b in zip(reading.text, text, strict=True)]
    confidence, right = np.array(confidence), np.array(right)
    assert confidence.min() >= 0 and confidence.max() <= 1
    bins = np.minimum((confidence * 5).astype(int), 4)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    assert sum(gaps) < 0.05  # expected calibration error


def test_reading_describes_itself(reader):
    images, batch = held_out(20)
    index = next(i for i, reading in enumerate(reader(images)) if reading.text == batch["text"][i])
    reading = reader(images[index : index + 1])[0]
    assert reading.words == [batch["text"][index]] and reading.word_confidences == [reading.word_confidence]
    boxes = reading.boxes
    expected = [*boxes[:, :2].min(dim=0).values.tolist(), *boxes[:, 2:].max(dim=0).values.tolist()]
    assert reading.word_boxes.tolist() == [expected]
    assert boxes[0, 0] < boxes[1, 0]
    assert reading.word_confidence == pytest.approx(reading.confidences.min().item())


def garbage():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    yield "noise", random(100, 3, 32, 32)
    yield "grey noise", random(100, 1, 32, 32).expand(-1, 3, -1, -1)
    yield "flat", random(50, 3, 1, 1).expand(-1, -1, 32, 32)
    yield "nearly flat", 0.5 + 0.02 * random(50, 3, 32, 32)
    yield "gradient", torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    yield "half", (torch.arange(32) > 15).float().expand(2, 3, 32, 32)
    yield "checkerboard", ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float().expand(2, 3, 32, 32)
    for side in (3, 5, 8, 16):
        clouds = interpolate(random(200, 3, side, side), size=(32, 32), mode="bicubic")
        yield f"clouds {side}", clouds.clamp(0, 1)


@pytest.mark.parametrize(("name", "images"), list(garbage()))
def test_garbage_reads_as_nothing_or_unsure(reader, name, images):
    confidences = [reading.word_confidence for reading in reader(images)]
    assert np.mean(confidences) < 0.03, name


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (2, 3, 1, 1), (1, 3, 5, 300), (1, 3, 300, 5), (2, 3, 131, 70)])
def test_odd_sizes_do_not_crash(reader, shape):
    readings = reader(torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert len(readings) == shape[0]


def test_extra_ink_lowers_the_word_confidence(reader):
    images, _ = held_out(200)
    blotted = images.clone()
    farthest = (images - images[:, :, :1, :1]).abs().sum(dim=1).flatten(1).argmax(dim=1)
    ink = images.flatten(2)[torch.arange(200), :, farthest]
    blotted[:, :, 30:, 12:22] = ink[:, :, None, None]
    before, after = reader(images), reader(blotted)
    both = [(a, b) for a, b in zip(before, after, strict=True) if a.text == b.text]
    assert len(both) > 100
    assert np.mean([b.word_confidence < 0.95 * a.word_confidence for a, b in both]) > 0.9


def test_strokes_that_broke_are_joined():
    images, batch = held_out(100)
    paper = images[:, :, :1, :1].expand_as(images)
    for row in range(100):
        for box in batch["boxes"][row].int().tolist():
            middle = (box[1] + box[3]) // 2
            images[row, :, middle, box[0] - 1 : box[2] + 1] = paper[row, :, middle, box[0] - 1 : box[2] + 1]
    pages = segment(images)
    assert (np.bincount(pages.page, minlength=100) == 2).mean() > 0.95


def test_reading_is_deterministic_and_independent_of_the_batch(reader):
    images, _ = held_out(64)
    trained_characters.cache_clear()
    again = Reader()
    state = torch.get_rng_state()
    for one, other in zip(reader(images), again(images), strict=True):
        assert one.text == other.text and torch.allclose(one.confidences, other.confidences, atol=1e-3)
    alone = [reader(images[i : i + 1])[0] for i in range(64)]
    assert [reading.text for reading in alone] == [reading.text for reading in reader(images)]
    assert torch.equal(state, torch.get_rng_state())


def test_cache_file(reader, tmp_path):
    path = tmp_path / "characters.safetensors"
    images, _ = held_out(16)
    written, loaded = Reader(cache=path), Reader(cache=path)
    assert path.exists()
    for one, other in zip(written(images), loaded(images), strict=True):
        assert one.text == other.text and torch.equal(one.confidences, other.confidences)
    CharacterClassifier(torch.zeros(3, NUM_FEATURES + 1), torch.zeros(3, JUNK + 1)).save(path)
    with pytest.raises(ValueError, match="CharacterClassifier: path: expected centres"):
        Reader(cache=path)
    path.write_bytes(b"cut")
    with pytest.raises(
        ValueError, match=r"CharacterClassifier: path: expected a file .* got .*characters\.safetensors"
    ):
        Reader(cache=path)


def test_features_have_unit_parts():
    crops = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(0))
    features = gradient_features(crops)
    assert features.shape == (5, NUM_FEATURES)
    assert torch.allclose(features.square().sum(dim=1), torch.tensor(1.25))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"Reader: images: expected \(B, 3, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"Reader: images: expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"Reader: images: expected a float tensor, got torch.uint8"),
        (-torch.ones(1, 3, 32, 32), r"Reader: images: expected values in \[0, 1\], got \[-1, -1\]"),
        (torch.full((1, 3, 4, 4), torch.nan), r"Reader: images: expected finite values"),
    ],
)
def test_errors_name_the_argument(reader, images, message):
    with pytest.raises(ValueError, match=message):
        reader(images)


def test_reading_is_fast_enough_for_a_reward(reader):
    """About 45 ms for 256 images on one core. Processor time, so that a busy machine does not fail the test."""
    images, _ = held_out(256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(4):
            start = time.process_time()
            reader(images)
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 0.25
