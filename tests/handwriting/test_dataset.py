"""The handwriting scenes: partition, determinism, boxes, contrast, references, errors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastvar.handwriting import HandwritingScenes, scan_partition
from fastvar.handwriting.draws import uniforms
from fastvar.handwriting.rendering import BOX_LEVEL, LUMA, MIN_CONTRAST
from fastvar.handwriting.scans import SHARES, legible_scans, load_scans

KNOWN_TEXTS = ["79", "99", "67", "35", "16", "19", "96", "11", "15", "22"]
KNOWN_UNIFORM = 0.7082596418500955
ROOT = Path(__file__).parents[2]


def scenes(**options):
    return HandwritingScenes(**{"length": 500} | options)


def equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def test_partition_is_disjoint_stratified_and_complete():
    _, classes = load_scans()
    parts = scan_partition()
    assert set(parts) == set(SHARES)
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together)
    assert np.array_equal(np.sort(together), np.flatnonzero(legible_scans()))
    assert 0.98 < legible_scans().mean() < 0.99
    for name, share in SHARES.items():
        per_class = np.bincount(classes[parts[name]]) / np.bincount(classes[together])
        assert np.abs(per_class - share).max() < 0.01


def test_item_shapes_types_and_ranges():
    item = scenes(size=(32, 48), digits=3)[7]
    assert item["image"].shape == item["reference"].shape == (3, 32, 48)
    assert item["image"].dtype == item["reference"].dtype == item["boxes"].dtype == torch.float32
    assert item["label"].dtype == item["reference_position"].dtype == item["scans"].dtype == torch.int64
    assert item["boxes"].shape == (3, 4) and item["scans"].shape == (3,)
    assert len(item["text"]) == 3 and item["label"] == int(item["text"])
    for image in (item["image"], item["reference"]):
        assert image.min() >= -1 and image.max() <= 1


def test_scans_show_the_text_and_belong_to_the_split():
    _, classes = load_scans()
    for split in ("train", "test"):
        batch = scenes(split=split).batch(range(500))
        assert np.isin(batch["scans"], scan_partition()[split]).all()
        assert ["".join(map(str, classes[row])) for row in batch["scans"].numpy()] == batch["text"]
    # 500 x 2 digits: each of the ten is expected 100 times, with a standard deviation of 9.5.
    counts = np.bincount([int(character) for text in batch["text"] for character in text], minlength=10)
    assert counts.min() > 60 and counts.max() < 140


def test_items_depend_on_nothing_but_their_key():
    first, again = scenes(seed=3), scenes(seed=3, length=9000)
    batch = first.batch([5, 499, 0, -1])
    torch.manual_seed(1)
    np.random.seed(1)
    for row, index in enumerate([5, 499, 0, 499]):
        equal(again[index], {name: values[row] for name, values in batch.items()})
    assert batch["image"][1].equal(batch["image"][3])
    assert not torch.equal(scenes(seed=4)[5]["image"], first[5]["image"])
    assert not torch.equal(scenes(seed=3, split="test")[5]["image"], first[5]["image"])
    assert not torch.equal(first[5]["image"], first[6]["image"])


def test_known_item_stays_as_it_is():
    """A change of the generator or the order of draws would silently change every published seed."""
    batch = scenes(length=10).batch(range(10))
    assert batch["text"] == KNOWN_TEXTS
    assert uniforms((0, 1), [2], 1)[0, 0] == pytest.approx(KNOWN_UNIFORM, abs=1e-15)


def test_data_loader_workers_give_the_same_batches():
    dataset = scenes(length=24)
    alone = list(DataLoader(dataset, batch_size=8))
    workers = list(DataLoader(dataset, batch_size=8, num_workers=2))
    for a, b, start in zip(alone, workers, range(0, 24, 8), strict=True):
        equal(a, b)
        equal(a, dataset.batch(range(start, start + 8)))


@pytest.mark.parametrize(("size", "digits"), [((32, 32), 2), ((32, 32), 3), ((20, 40), 2), (64, 3), (16, 1)])
def test_boxes_are_tight_apart_and_inside(size, digits):
    dataset = scenes(size=size, digits=digits)
    height, width = dataset.size
    batch = dataset.batch(range(200))
    boxes = batch["boxes"]
    assert (boxes[..., :2] >= 1).all() and (boxes[..., 2] <= width - 1).all() and (boxes[..., 3] <= height - 1).all()
    assert ((boxes[..., 3] - boxes[..., 1]) >= 6).all()
    # Distance from a plane through the corners: the paper and its shading (clipped where it would exceed white).
    image = batch["image"]
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    top, left = image[:, :, 0, 0], image[:, :, 0, -1] - image[:, :, 0, 0]
    down = image[:, :, -1, 0] - top
    plane = top[..., None, None] + left[..., None, None] * columns + down[..., None, None] * rows[:, None]
    distance = (image - plane).abs().amax(dim=1)
    distance = distance / distance.amax(dim=(1, 2), keepdim=True)
    outside = torch.ones(200, height, width, dtype=torch.bool)
    for row in range(200):
        for x0, y0, x1, y1 in boxes[row].int().tolist():
            assert outside[row, y0:y1, x0:x1].all(), "digits overlap"
            outside[row, y0:y1, x0:x1] = False
            inside = distance[row, y0:y1, x0:x1]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.max() > BOX_LEVEL / 2
    assert distance[outside].max() < BOX_LEVEL + 0.1


def test_digits_do_not_touch():
    from scipy import ndimage

    batch = scenes(digits=3).batch(range(300))
    image = batch["image"]
    paper = torch.stack([image[:, :, 0, 0], image[:, :, -1, -1]]).mean(dim=0)[..., None, None]
    distance = (image - paper).abs().amax(dim=1)
    ink = (distance > 0.5 * distance.amax(dim=(1, 2), keepdim=True)).numpy()
    for row in range(300):
        labels, _ = ndimage.label(ink[row], structure=np.ones((3, 3)))
        owners = [set(np.unique(labels[y0:y1, x0:x1])) - {0} for x0, y0, x1, y1 in batch["boxes"][row].int().tolist()]
        assert not (owners[0] & owners[1]) and not (owners[1] & owners[2])


def test_ink_and_paper_contrast():
    batch = scenes().batch(range(400))
    luma = torch.tensor(LUMA, dtype=torch.float32)
    for name in ("image", "reference"):
        light = torch.einsum("bchw,c->bhw", (batch[name] + 1) / 2, luma)
        paper = torch.stack([light[:, 0, 0], light[:, 0, -1], light[:, -1, 0], light[:, -1, -1]]).mean(dim=0)
        ink = (light - paper[:, None, None]).abs().amax(dim=(1, 2))
        assert ink.min() > MIN_CONTRAST - 0.07  # shading takes a little


def test_reference_shows_the_same_ink_but_is_no_crop():
    batch = scenes().batch(range(300))
    positions = batch["reference_position"]
    assert positions.bincount(minlength=2).min() > 100
    papers = (batch["image"][:, :, 0, 0] - batch["reference"][:, :, 0, 0]).abs().amax(dim=1)
    assert papers.median() > 0.1
    from fastvar.handwriting.segmentation import segment

    ours, theirs = (segment((batch[name] + 1) / 2) for name in ("image", "reference"))
    subject = np.searchsorted(ours.page, np.arange(300)) + positions.numpy()
    difference = np.abs(ours.ink_colours()[subject] - theirs.ink_colours()).max(axis=1)
    assert np.median(difference) < 0.02 and difference.max() < 0.12
    sizes = [boxes[:, 3] - boxes[:, 1] for boxes in (ours.boxes[subject], theirs.boxes)]
    assert np.std(sizes[1] / sizes[0]) > 0.1


def test_reference_at_the_scenes_place():
    own, placed = scenes(), scenes(reference_place="scene")
    batch, drawn = placed.batch(range(300)), own.batch(range(300))
    for name in ("image", "boxes", "scans", "reference_position"):
        assert torch.equal(batch[name], drawn[name]), name
    assert not torch.equal(batch["reference"], drawn["reference"])
    papers = (batch["image"][:, :, 0, 0] - batch["reference"][:, :, 0, 0]).abs().amax(dim=1)
    assert papers.median() > 0.1
    from fastvar.handwriting.segmentation import segment

    found = segment((batch["reference"] + 1) / 2)
    assert np.array_equal(found.page, np.arange(300))  # one digit each
    boxes = batch["boxes"][torch.arange(300), batch["reference_position"]].numpy()
    assert np.abs(found.boxes - boxes).max() <= 2 and np.abs(found.boxes - boxes).mean() < 0.5


def test_candidates_at_the_scenes_place_stay_inside():
    from fastvar.handwriting.segmentation import segment

    dataset = scenes(split="test", length=100, size=(24, 32), reference_place="scene")
    everything = dataset.candidates(range(100), 8)
    batch = dataset.batch(range(100))
    rows = torch.arange(100)
    assert torch.equal(everything["images"][rows, everything["answers"]], batch["reference"])
    boxes = segment((everything["images"].flatten(0, 1) + 1) / 2).boxes
    assert boxes.shape == (800, 4)
    assert (boxes[:, :2] >= 1).all() and (boxes[:, 2] <= 31).all() and (boxes[:, 3] <= 23).all()
    wanted = batch["boxes"][rows, batch["reference_position"]].repeat_interleave(8, 0).numpy()
    centres = [(b[:, :2] + b[:, 2:]) / 2 for b in (boxes, wanted)]
    assert np.abs(centres[0] - centres[1]).mean() < 1.5


def test_candidates_hide_the_reference_among_the_same_digit():
    dataset = scenes(split="test", length=200)
    some = dataset.candidates([9, 30], 6)
    everything = dataset.candidates(range(200), 6)
    assert everything["images"].shape == (200, 6, 3, 32, 32)
    assert torch.equal(some["images"], everything["images"][[9, 30]])
    batch = dataset.batch(range(200))
    assert torch.equal(everything["positions"], batch["reference_position"])
    rows = torch.arange(200)
    assert torch.equal(everything["images"][rows, everything["answers"]], batch["reference"])
    assert everything["answers"].bincount(minlength=6).min() > 10
    for first in range(6):
        for second in range(first):
            gap = (everything["images"][:, first] - everything["images"][:, second]).abs().amax(dim=(1, 2, 3))
            assert gap.min() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": 4}, r"HandwritingScenes: digits: expected 1 to 3 at 32x32, got 4"),
        ({"digits": 0}, r"digits: expected 1 to 3"),
        ({"size": 8, "digits": 1}, r"digits: expected a larger size"),
        ({"size": (32,)}, r"size: expected a positive int or \(height, width\)"),
        ({"size": (32, -1)}, r"size: expected"),
        ({"split": "valid"}, r"split: expected one of"),
        ({"reference_place": "else"}, r"reference_place: expected \"own\" or \"scene\", got 'else'"),
        ({"length": 0}, r"length: expected at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        scenes(**options)


def test_indices_outside_are_errors():
    dataset = scenes(length=3)
    assert len(list(dataset)) == 3  # iteration ends at an IndexError
    with pytest.raises(IndexError, match="HandwritingScenes: index"):
        dataset.batch([0, 3])
    with pytest.raises(ValueError, match="count: expected 2 to"):
        dataset.candidates([0], 1)


def test_import_is_light():
    program = (
        "import sys, fastvar.data, fastvar.handwriting; "
        "print([name for name in ('sklearn', 'scipy', 'torchvision', 'PIL') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
