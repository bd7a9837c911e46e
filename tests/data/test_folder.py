"""Folders of images: order, labels, transforms, errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar.data import ImageFolder
from fastvar.data.folder import image_transform


def write(path, width=40, height=30, colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


def test_class_subfolders_are_sorted_labels(tmp_path):
    for name in ("b/2.png", "b/1.png", "a-b/1.png", "a/deep/er.JPG", "a/z.png", ".hidden/1.png", "a/.thumb.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    dataset = ImageFolder(tmp_path, size=16)
    assert dataset.classes == ["a", "a-b", "b"] and dataset.num_classes == 3
    names = [(path.relative_to(tmp_path).as_posix(), label) for path, label in dataset.samples]
    assert names == [("a/deep/er.JPG", 0), ("a/z.png", 0), ("a-b/1.png", 1), ("b/1.png", 2), ("b/2.png", 2)]
    item = dataset[2]
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
    assert item["label"].dtype == torch.int64 and item["label"] == 1
    assert item["path"].endswith("1.png")


def test_labels_of_given_classes(tmp_path):
    """A model's own names give the labels, also where a class has no images; others are refused."""
    for name in ("b/1.png", "a/1.png"):
        write(tmp_path / name)
    dataset = ImageFolder(tmp_path, size=16, classes=("b", "c", "a"))
    assert dataset.classes == ["b", "c", "a"] and dataset.num_classes == 3
    assert [(path.parent.name, label) for path, label in dataset.samples] == [("b", 0), ("a", 2)]
    with pytest.raises(ValueError, match=r"classes: expected subfolders of .* out of 2 classes \(b, c\), got a"):
        ImageFolder(tmp_path, size=16, classes=["b", "c"])
    with pytest.raises(ValueError, match=r"classes: expected class subfolders in .*, got images beside each other"):
        ImageFolder(tmp_path / "a", size=16, classes=["b", "c"])


def test_flat_folder_has_one_class(tmp_path):
    for name in ("b.png", "a.png"):
        write(tmp_path / name)
    dataset = ImageFolder(str(tmp_path), size=(8, 16))
    assert [path.name for path, _ in dataset.samples] == ["a.png", "b.png"]
    assert dataset.num_classes == 1 and dataset[1]["label"] == 0
    assert dataset[0]["image"].shape == (3, 8, 16)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("train", [True, False])
def test_every_shape_fills_the_size(size, train):
    for shape in ((40, 30), (30, 40), (5, 200), (200, 5), (7, 7), (18, 18)):
        image = Image.new("RGB", shape, (255, 128, 0))
        out = image_transform(size, train=train)(image)
        assert out.shape == (3, *size)
        expected = torch.tensor([1.0, 2 * 128 / 255 - 1, -1.0])
        assert torch.allclose(out, expected[:, None, None].expand_as(out), atol=1e-6)


def test_evaluation_is_the_centre_of_the_resized_image():
    pixels = np.zeros((18, 36, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.arange(36) * 7
    out = image_transform((16, 16), train=False)(Image.fromarray(pixels))
    # 16 x 1.125 = 18 rows, as the image has: no resampling; columns 10 to 25 of 36.
    assert torch.allclose(out[0, 0], torch.arange(10, 26) * 7 / 127.5 - 1, atol=1e-6)


def test_training_crops_and_flips_at_random_from_torch_state():
    pixels = np.random.default_rng(0).integers(0, 255, (18, 18, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    transform = image_transform((16, 16), train=True)
    torch.manual_seed(0)
    outs = [transform(image) for _ in range(60)]
    torch.manual_seed(0)
    assert torch.equal(transform(image), outs[0])
    assert len({out.numpy().tobytes() for out in outs}) > 12  # of 9 places x 2
    unflipped = image_transform((16, 16), train=True, flip=False)
    assert len({unflipped(image).numpy().tobytes() for _ in range(100)}) <= 9


def test_grey_transparent_and_rotated_files_are_read(tmp_path):
    Image.new("L", (20, 20), 255).save(tmp_path / "a.png")
    Image.new("RGBA", (20, 20), (0, 0, 255, 128)).save(tmp_path / "b.png")
    rotated = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None, :, None] * 6, 40, axis=0).repeat(3, axis=2))
    exif = rotated.getexif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    rotated.save(tmp_path / "c.png", exif=exif)
    dataset = ImageFolder(tmp_path, size=16, train=False)
    assert torch.allclose(dataset[0]["image"], torch.ones(3, 16, 16))
    assert dataset[1]["image"].shape == (3, 16, 16)
    turned = dataset[2]["image"][0]
    assert turned[:, 0].diff().min() > 0 and turned[0].diff().abs().max() < 1e-6


def test_own_transform(tmp_path):
    write(tmp_path / "a.png")
    dataset = ImageFolder(tmp_path, size=16, transform=lambda image: torch.full((3, 2, 2), image.width))
    assert dataset[0]["image"].tolist() == torch.full((3, 2, 2), 40).tolist()
    failing = ImageFolder(tmp_path, size=16, transform=lambda image: {}["mean"])
    with pytest.raises(ValueError, match=r"ImageFolder: transform: KeyError on .*a\.png \('mean'\)"):
        failing[0]


def test_errors_name_folder_and_file(tmp_path):
    with pytest.raises(ValueError, match=r"ImageFolder: root: expected a folder, got .*nowhere"):
        ImageFolder(tmp_path / "nowhere", size=16)
    with pytest.raises(ValueError, match=r"ImageFolder: root: expected images .* got none below"):
        ImageFolder(tmp_path, size=16)
    with pytest.raises(ValueError, match=r"ImageFolder: size: expected a positive int or \(height, width\), got 0"):
        ImageFolder(tmp_path, size=0)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    write(tmp_path / "cut.png", 200, 200)
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    dataset = ImageFolder(tmp_path, size=16)
    for index, name in enumerate(("broken.png", "cut.png")):
        with pytest.raises(ValueError, match=f"ImageFolder: root: expected a readable image, got .*{name}"):
            dataset[index]
    write(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=r"expected images either beside or inside subfolders, got both"):
        ImageFolder(tmp_path, size=16)
