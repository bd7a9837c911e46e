"""Pictures: files of any depth read as 8-bit RGB, tensors checked and made 8-bit, images as one grid, PNG."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from fastvar.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

_PADDING = 2  # white pixels around each image of a grid
_ORIENTED_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def read_picture(file: str | Path | BinaryIO, owner: str, *, name: str | None = None) -> Image:
    """A picture as a PIL RGB image of 8 bits a channel, turned as its orientation tag says.

    16 bits a channel (PNG, TIFF, PGM) are scaled to 8. What is transparent is laid on white. Broken metadata of a good
    picture is passed over.

    Args:
        file: a path, or an open file.
        owner: "class: argument", as it opens the message.
        name: of the file in messages, where it is no path.

    Raises:
        ValueError: whatever else the file is: no picture, a damaged one, one too large (Pillow's MAX_IMAGE_PIXELS), or
            one of floating-point or 32-bit numbers, as nothing says which of these is white. Names the file.
    """
    try:
        try:
            return _decoded(file)
        except Exception:
            bare = _without_metadata(file)
            if bare is None:
                raise
            return _decoded(bare)
    except Exception as error:  # what a damaged file makes of Pillow is anything
        shown = file if isinstance(file, str | Path) else name or "something else"
        raise ValueError(f"{owner}: expected a readable image, got {shown} ({error})") from error


def picture_size(file: str | Path | BinaryIO) -> tuple[int, int]:
    """(H, W) of a picture in pixels, turned as its orientation tag says, as `read_picture` makes it.

    Pixels are read of a PNG alone that may have such a tag.

    Raises:
        OSError, ValueError: no picture that Pillow knows.
    """
    from PIL import Image as pil

    with pil.open(file) as opened:
        width, height = opened.size
        # of a PNG Pillow decodes all pixels to look for a tag behind them
        png = opened.format == "PNG"
        turned = not png and _orientation(opened) >= 5
    if png and _may_be_turned(file):
        width, height = read_picture(file, "picture_size: file").size
    return (width, height) if turned else (height, width)


def _may_be_turned(file: str | Path | BinaryIO) -> bool:
    """Whether a PNG has a chunk, before or behind its pixels, in which Pillow looks for an orientation."""
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:
            return _may_be_turned(opened)
    start = 8
    while file.seek(start) and len(head := file.read(8 + 22)) > 8:
        length, name = struct.unpack_from(">I4s", head)
        if name == b"eXIf" or head[8:].startswith(_ORIENTED_TEXTS):
            return True
        start += 12 + length
    return False


def _orientation(image: Image) -> int:
    from PIL import ExifTags

    try:  # not ImageOps.exif_transpose: that writes the other tags anew, and fails where these are broken
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _decoded(file: str | Path | BinaryIO) -> Image:
    from PIL import Image as pil

    turn = pil.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    with pil.open(file) as opened:
        opened.load()
        orientation = _orientation(opened)
        image = _eight_bits(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # what is hidden may be any colour
            image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    return image.transpose(turns[orientation]) if orientation in turns else image


def _eight_bits(image: Image) -> Image:
    """Scaled where Pillow has more than 8 bits a channel, which its own conversion would clip at 255."""
    import numpy as np
    from PIL import Image as pil

    # Pillow reads 16 bits as "I;16", those of PGM (and, before version 11, of PNG) as 32-bit integers.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if image.mode in ("I", "F") and not sixteen:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{kind} numbers, of which nothing says which is white; save it with 8 or 16 bits a channel")
    if not sixteen:
        return image
    tags = getattr(image, "tag_v2", {})  # of TIFF: bits a sample, and whether 0 is white
    white = 2 ** tags.get(258, (16,))[0] - 1
    grey = np.asarray(image).astype(np.float32) / white
    if tags.get(262) == 0:
        grey = 1 - grey
    return pil.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8))


def _without_metadata(file: str | Path | BinaryIO) -> BinaryIO | None:
    """A PNG's chunks that make up its pixels, and its orientation if that is whole; None for another format.

    Pillow refuses a PNG for a wrong checksum or a large text in chunks that say nothing about pixels.
    """
    if isinstance(file, str | Path):
        data = Path(file).read_bytes()
    else:
        file.seek(0)
        data = file.read()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, start = [data[:8]], 8
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + 12 + length]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name in _PIXEL_CHUNKS or (name == b"eXIf" and whole):
            kept.append(chunk)
        start += 12 + length
    return io.BytesIO(b"".join(kept))


def image_grid(images: torch.Tensor, columns: int, *, zoom: int = 1) -> Image:
    """Images (N, 3, H, W) in [0, 1] as one picture with `columns` a row, pixels repeated `zoom` times."""
    from PIL import Image as pil

    pixels = to_uint8(images).repeat(zoom, 1).repeat(zoom, 2)
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (_PADDING + columns * (width + _PADDING), _PADDING + rows * (height + _PADDING))
    grid = pil.new("RGB", size, "white")
    for i, image in enumerate(pixels):
        place = (_PADDING + i % columns * (width + _PADDING), _PADDING + i // columns * (height + _PADDING))
        grid.paste(pil.fromarray(image), place)
    return grid


def png(image: Image) -> bytes:
    """A PIL image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_picture(image: Image, path: Path) -> None:
    """Write a PNG; an interrupted write leaves no broken file behind."""
    with replacing(path) as temporary:
        temporary.write_bytes(png(image))


def check_images(images: torch.Tensor, name: str, dimensions: int = 4) -> None:
    """Raise ValueError unless `images` is a float tensor (..., 3, H, W) with values in [0, 1].

    name: "function: argument", as it opens the message.
    """
    shape = "(B, 3, H, W)" if dimensions == 4 else "(B, N, 3, H, W)"
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{name}: expected a float tensor, got {got}")
    if images.dim() != dimensions or images.shape[-3] != 3 or images.shape[-1] < 1 or images.shape[-2] < 1:
        raise ValueError(f"{name}: expected {shape}, got {tuple(images.shape)}")
    if images.numel() and not bool(torch.isfinite(images).all()):
        raise ValueError(f"{name}: expected finite values, got infinities or NaNs")
    if images.numel() and (images.min() < -1e-2 or images.max() > 1 + 1e-2):
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"{name}: expected values in [0, 1], got [{low:.3g}, {high:.3g}]")


def to_uint8(images: torch.Tensor) -> Any:
    """Images as a numpy array (B, H, W, 3) of 8 bits, rounded to nearest, for what wants files or arrays."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
