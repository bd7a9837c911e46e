"""Images with texts: folders, JSON lines, tars; buckets by ratio; what cannot be taken is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastvar.data import TextImages
from fastvar.data.text_images import find_text_images
from fastvar.pictures import picture_size, read_picture

SIZES = ((16, 16), (24, 12), (12, 24))


def write(path: Path, width: int, height: int, text: str | None = "a text", colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (colour, 90, 20)).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of three ratios."""
    root = tmp_path / "images"
    write(root / "a.png", 40, 40, " square \n", 0)
    write(root / "b.jpg", 20, 41, "\ufefftall 日本", 50)
    write(root / "deep/c.png", 60, 30, "wide", 100)
    write(root / "deep/d.png", 30, 36, "", 150)  # nearer to a square
    write(root / "e.v2.png", 200, 10, "very wide", 200)
    (root / "README.txt").write_text("no caption")
    return root


def into_tars(folder: Path, target: Path) -> None:
    """The same in two shards, captions in one case before their images."""
    target.mkdir()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, names in enumerate((("a", "README", "e.v2"), ("b", "c", "d"))):
        with tarfile.open(target / f"{number}.tar", "w") as tar:
            for path in reversed(files) if number else files:
                if path.stem in names:
                    tar.add(path, str(path.relative_to(folder)))


def into_lines(folder: Path, target: Path) -> None:
    entries = [
        {"image": f"images/{path.relative_to(folder)}", "text": path.with_suffix(".txt").read_text("utf-8-sig")}
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".png", ".jpg")
    ]
    target.write_text("\n\n".join(json.dumps(entry) for entry in entries) + "\n")


def test_sources_hold_the_same(folder: Path, tmp_path: Path) -> None:
    into_tars(folder, tmp_path / "tars")
    into_lines(folder, tmp_path / "list.jsonl")
    plain = TextImages(folder, sizes=SIZES)
    assert plain.texts == ["square", "tall 日本", "wide", "", "very wide"] and plain.buckets == [0, 1, 2, 0, 2]
    expected = {item["text"]: item["image"] for item in plain}
    for source in (tmp_path / "tars/*.tar", tmp_path / "tars", tmp_path / "list.jsonl"):
        found = TextImages(str(source), sizes=SIZES)
        assert sorted(found.texts) == sorted(plain.texts)
        assert {text: size for text, size in zip(found.texts, found.buckets, strict=True)} == dict(
            zip(plain.texts, plain.buckets, strict=True)
        )
        assert all(torch.equal(item["image"], expected[item["text"]]) for item in found)
    assert len(find_text_images(tmp_path / "tars/0.tar")) == 2


def test_line_separators_belong_to_texts(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    write(tmp_path / "a.png", 8, 8)
    entry = json.dumps({"image": "a.png", "text": f"{text} "}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_bytes(f"{entry}\r\n{entry}\n".encode())
    assert [item.text for item in find_text_images(tmp_path / "list.jsonl")] == [text, text]


def test_two_images_of_one_name_share_its_text(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/a.jpg"):
        write(tmp_path / name, 8, 8, "both")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted((tmp_path / "images").iterdir()):
            tar.add(path, path.name)
    for source in (tmp_path / "images", tmp_path / "x.tar"):
        found = find_text_images(source)
        assert [Path(item.name).name.rpartition(" ")[2] for item in found] == ["a.jpg", "a.png"]
        assert [item.text for item in found] == ["both", "both"]


def test_an_image_fills_its_size(folder: Path) -> None:
    """The centre of what covers it, nothing stretched and no border lost."""
    data = TextImages(folder, sizes=SIZES)
    for index, (red, bucket) in enumerate(zip((0, 50, 100, 150, 200), (0, 1, 2, 0, 2), strict=True)):
        image = data[index]["image"]
        assert image.shape == (3, *SIZES[bucket]) and image.dtype == torch.float32
        torch.testing.assert_close(image[0], torch.full(SIZES[bucket], red / 127.5 - 1), atol=0.03, rtol=0)
    columns = np.tile(np.arange(32, dtype=np.uint8) * 7, (16, 1))
    Image.fromarray(np.stack([columns] * 3, 2)).save(folder / "a.png")
    pixels = TextImages(folder, sizes=[(16, 16)])[0]["image"]
    torch.testing.assert_close(pixels[0, 0], torch.arange(8, 24) * 7 / 127.5 - 1)


def test_size_of_a_turned_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    for name, expected in (("a.jpg", (40, 20)), ("a.png", (40, 20)), ("a.webp", (40, 20))):
        image.save(tmp_path / name, exif=exif)
        assert picture_size(tmp_path / name) == expected, name
    whole = (tmp_path / "a.png").read_bytes()
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    behind = whole[:start] + whole[end:-12] + whole[start:end] + whole[-12:]  # before the last chunk, IEND
    (tmp_path / "behind.png").write_bytes(behind)
    assert picture_size(tmp_path / "behind.png") == picture_size(io.BytesIO(behind)) == (40, 20)
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    image.save(tmp_path / "xmp.png", pnginfo=text)
    assert read_picture(tmp_path / "xmp.png", "here").size == (20, 40)
    assert picture_size(tmp_path / "xmp.png") == (40, 20)
    image.save(tmp_path / "b.png")
    assert picture_size(io.BytesIO((tmp_path / "b.png").read_bytes())) == (20, 40)


def test_bad_items_are_named_at_the_start(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    into_tars(folder, tmp_path / "tars")
    write(folder / "f.png", 10, 10, None)
    (folder / "g.png").write_bytes(b"no picture")
    (folder / "g.txt").write_text("a text")
    (folder / "h.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "h.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"got 2 others: .*f.png: f.txt is missing; .*h.png: .* text in UTF-8"):
        TextImages(folder, sizes=SIZES)
    data = TextImages(folder, sizes=SIZES, skip_bad=True)
    assert len(data) == 5 and "2 images are left out" in caplog.text and "1 images are left out" in caplog.text
    assert "g.png: no readable image" in caplog.text
    lines = tmp_path / "list.jsonl"
    lines.write_text(
        '{"image": "images/a.png"}\n[1]\n{"image": "images/a.png", "text": "x"}\n{"image": 3, "text": ""}\n'
    )
    with pytest.raises(
        ValueError, match=r"got 3 others: .*list.jsonl, line 1: it is no object .*; .*line 2.*; .*line 4"
    ):
        TextImages(lines, sizes=SIZES)
    lines.write_text('{"image": "nowhere.png", "text": "x"}\n')
    with pytest.raises(ValueError, match=r"got 1 others: .*nowhere.png: no readable image"):
        TextImages(lines, sizes=SIZES)
    with tarfile.open(tmp_path / "tars/2.tar", "w") as tar:
        tar.add(folder / "f.png", "x/f.png")
        tar.add(folder / "h.png", "h.png")
        tar.add(folder / "h.txt", "h.txt")
    missing, undecoded = "2.tar: x/f.png: x/f.txt is missing", "2.tar: h.png: expected text in UTF-8, got h.txt"
    with pytest.raises(ValueError, match=rf"{missing}; .*{undecoded}"):
        TextImages(tmp_path / "tars", sizes=SIZES)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    """Whose head is whole."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:4000])
    (tmp_path / "cut.txt").write_text("x")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "cut.png", "cut.png")
        tar.add(tmp_path / "cut.txt", "cut.txt")
    for source, name in ((tmp_path, r"cut\.png"), (tmp_path / "x.tar", r"x\.tar: cut\.png")):
        data = TextImages(source, sizes=SIZES)
        with pytest.raises(ValueError, match=rf"TextImages: source: expected a readable image, got .*{name}"):
            data[0]


def test_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    (tmp_path / "y.tar").write_bytes((tmp_path / "x.tar.gz").read_bytes())
    for source, message in (
        ("empty", "expected images with texts, got none in"),
        ("nowhere", "expected a folder, a .jsonl or tars, got .*nowhere"),
        ("x.tar.gz", "expected a folder, a .jsonl or tars, got"),
        ("y.tar", "expected a tar that is not compressed, got .*y.tar"),
    ):
        with pytest.raises(ValueError, match=f"TextImages: source: {message}"):
            TextImages(tmp_path / source, sizes=SIZES)
    for sizes in ((), ((0, 4),)):
        with pytest.raises(ValueError, match="TextImages: sizes: expected pairs"):
            TextImages(tmp_path, sizes=sizes)
