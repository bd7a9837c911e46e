"""Pictures: every depth, whatever is broken in a file, grids."""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from fastvar.data import ImageFolder
from fastvar.pictures import image_grid, png, read_picture
from fastvar.rl.rewards.remote import decode_images

RAMP = np.tile(np.arange(32, dtype=np.uint8) * 8, (24, 1))
LANDSCAPE = np.repeat(RAMP[..., None], 3, axis=2)


def grey(path: Path) -> np.ndarray:
    image = read_picture(path, "here")
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits_are_scaled(name: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / name)
    assert np.array_equal(grey(tmp_path / name), RAMP)


def test_tiff_says_its_white(tmp_path: Path) -> None:
    """12 bits of 16, and 0 for white instead of black: what the tags say."""
    path = tmp_path / "a.tiff"
    Image.fromarray(np.full((8, 8), 0xFFFF, np.uint16)).save(path)
    data = path.read_bytes()

    def changed(tag: int, before: int, after: int) -> bytes:
        old, new = (struct.pack("<HHIHH", tag, 3, 1, value, 0) for value in (before, after))
        assert data.count(old) == 1
        return data.replace(old, new)

    path.write_bytes(changed(258, 16, 12))
    assert (grey(path) == 255).all()
    path.write_bytes(changed(262, 1, 0))
    assert (grey(path) == 0).all()


@pytest.mark.parametrize(
    ("pixels", "kind"), [((RAMP / 255).astype(np.float32), "floating-point"), (RAMP.astype(np.int32) * 257, "32-bit")]
)
def test_numbers_without_a_white_are_refused(pixels: np.ndarray, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match=rf"here: expected a readable image, got .*a\.tiff \({kind} numbers"):
        read_picture(path, "here")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    """Half of a picture whose hidden colour is black, and a pixel of half of it."""
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (4, 1))
        image.putalpha(Image.fromarray(np.array([[0, 0, 255, 128]], np.uint8)))
        expected = [255, 255, 0, 127]
    else:
        image = Image.fromarray(np.array([[0, 0, 90, 90]], np.uint8)).convert(mode)
        expected = [255, 255, 90, 90]
    hidden = {"P": {"transparency": 0}, "RGB": {"transparency": (0, 0, 0)}}
    image.save(tmp_path / "a.png", **hidden.get(mode, {}))
    assert grey(tmp_path / "a.png").tolist() == [expected]


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TURNED = struct.pack("<HHII", 0x0112, 3, 1, 6)  # to be shown turned a quarter clockwise


@pytest.mark.parametrize(
    "broken",
    [
        struct.pack("<HHII", 0x010E, 5, 1, 5),  # a description that is a fraction
        struct.pack("<HHII", 0x8769, 6, 4, 0xFFFFFFFF),  # a directory before the file's beginning
    ],
)
def test_orientation_beside_broken_metadata(broken: bytes, tmp_path: Path) -> None:
    Image.fromarray(LANDSCAPE).save(tmp_path / "a.jpg", exif=exif(TURNED, broken), quality=100)
    image = np.asarray(read_picture(tmp_path / "a.jpg", "here"))
    assert image.shape == (32, 24, 3)
    assert np.abs(image[:, 0, 0].astype(int) - RAMP[0]).max() <= 2
    assert np.asarray(ImageFolder(tmp_path, size=8)[0]["image"]).shape == (3, 8, 8)


def test_png_with_broken_metadata(tmp_path: Path) -> None:
    """A text that Pillow finds too large, a checksum that is wrong, beside an orientation that is right."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.fromarray(LANDSCAPE).save(tmp_path / "a.png", pnginfo=text, exif=exif(TURNED))
    with pytest.raises(ValueError, match="too large"), Image.open(tmp_path / "a.png") as image:
        image.load()
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png", "here")), np.rot90(LANDSCAPE, -1))
    chunk = struct.pack(">I", 3) + b"tEXtabc" + bytes(4)  # 0 is not its checksum
    whole = png(Image.fromarray(LANDSCAPE))
    (tmp_path / "b.png").write_bytes(whole[:33] + chunk + whole[33:])
    assert np.array_equal(np.asarray(read_picture(tmp_path / "b.png", "here")), LANDSCAPE)
    with open(tmp_path / "b.png", "rb") as file:
        assert np.array_equal(np.asarray(read_picture(file, "here")), LANDSCAPE)


def test_whatever_a_file_is_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        with pytest.raises(ValueError, match=f"here: expected a readable image, got .*{name}"):
            read_picture(tmp_path / name, "here")

    refused("nowhere.png")
    (tmp_path / "text.png").write_text("no image")
    refused("text.png")
    whole = png(Image.fromarray(LANDSCAPE))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    refused("cut.png")
    bitmap = io.BytesIO()
    Image.fromarray(LANDSCAPE).save(bitmap, format="BMP")
    damaged = bytearray(bitmap.getvalue())
    damaged[25] = 4  # a height of 67 million
    (tmp_path / "damaged.bmp").write_bytes(damaged)
    refused("damaged.bmp")
    (tmp_path / "large.png").write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused("large.png")


def test_grid() -> None:
    images = torch.zeros(3, 3, 2, 4)
    images[1, 0] = 1
    grid = np.asarray(image_grid(images, 2, zoom=2))
    assert grid.shape == (2 + 2 * (4 + 2), 2 + 2 * (8 + 2), 3)
    assert (grid[2:6, 2:10] == 0).all() and (grid[2:6, 12:20] == (255, 0, 0)).all() and (grid[8:12, 2:10] == 0).all()
    assert (grid[:2] == 255).all() and (grid[:, 10:12] == 255).all() and (grid[8:12, 12:20] == 255).all()


def test_sixteen_bits_over_http() -> None:
    encoded = base64.b64encode(png(Image.fromarray(RAMP.astype(np.uint16) * 257))).decode()
    assert torch.equal(decode_images([encoded])[0, 0], torch.from_numpy(RAMP) / 255)
    with pytest.raises(ValueError, match=r"decode_images: encoded\[1\]: expected a readable image"):
        decode_images([encoded, ""])
