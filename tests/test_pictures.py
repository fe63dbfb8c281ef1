"""Decoding and resizing one picture: every kind of file, and mistakes."""

import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_sets import png

from distributed_inr.raw import pictures
from distributed_inr.raw.pictures import Form


def bytes_of(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixel(content: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    return pictures.decode(content).getpixel(at)  # type: ignore[return-value]


def test_sixteen_bits_of_grey_keep_their_range() -> None:
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    content = bytes_of(Image.fromarray(values), "PNG")
    assert [pixel(content, (x, y))[0] for y in (0, 1) for x in (0, 1)] == [0, 100, 200, 255]


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert pixel(bytes_of(half, "PNG")) == (255, 127, 127)
    assert pixel(bytes_of(Image.new("LA", (2, 2), (0, 0)), "PNG")) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert pixel(bytes_of(palette, "PNG")) == (0, 0, 255)
    assert pixel(bytes_of(palette, "PNG", transparency=1)) == (255, 255, 255)


def test_a_transparent_colour_of_an_rgb_file_becomes_white() -> None:
    content = bytes_of(Image.new("RGB", (2, 2), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    stored = Image.open(io.BytesIO(pictures.encode(content, Form())[1]))
    assert stored.info == {} and stored.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_and_grey_become_rgb() -> None:
    assert pixel(bytes_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))[0] > 200
    assert pixel(bytes_of(Image.new("L", (2, 2), 77), "PNG")) == (77, 77, 77)
    assert pixel(bytes_of(Image.new("1", (2, 2), 1), "PNG")) == (255, 255, 255)


def test_pictures_are_turned_upright() -> None:
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    content = bytes_of(picture, "PNG", exif=exif)
    assert pictures.decode(content).size == (2, 4)
    assert pixel(content, (1, 0)) == (255, 0, 0)
    suffix, stored = pictures.encode(content, Form())
    assert Image.open(io.BytesIO(stored)).size == (2, 4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = bytes_of(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(content) == (255, 0, 0)
    suffix, stored = pictures.encode(content, Form())
    assert suffix == "png" and getattr(Image.open(io.BytesIO(stored)), "n_frames", 1) == 1


def test_plain_files_keep_their_bytes_where_no_pixel_changes() -> None:
    content = png(0, 16)
    assert pictures.encode(content, Form()) == ("png", content)
    assert pictures.encode(content, Form(size=16)) == ("png", content)
    jpeg = bytes_of(pictures.decode(content), "JPEG")
    assert pictures.encode(jpeg, Form(size=16)) == ("jpg", jpeg)
    assert pictures.encode(jpeg, Form(size=8))[0] == "png"


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_lossless_encodings_keep_every_pixel(encoding: pictures.Encoding) -> None:
    content = png(0, 16)
    suffix, stored = pictures.encode(content, Form(encoding=encoding))
    assert suffix == encoding
    assert pictures.decode(stored).tobytes() == pictures.decode(content).tobytes()


@pytest.mark.parametrize("resize", ["center-crop-lanczos", "center-crop-area", "pad-lanczos"])
@pytest.mark.parametrize("size", [(64, 64), (100, 40), (33, 71)])
def test_resizing_gives_the_size_and_keeps_the_middle(resize: pictures.Resize, size: tuple[int, int]) -> None:
    """A disc in the middle of the shorter side stays a disc in the middle."""
    width, height = size
    y, x = np.mgrid[:height, :width] + 0.5
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(size) / 4) ** 2
    content = bytes_of(Image.fromarray((np.dstack([disc] * 3) * 255).astype(np.uint8)), "PNG")
    _, stored = pictures.encode(content, Form(size=16, protocol=resize, enlarge=True))
    pixels = np.asarray(Image.open(io.BytesIO(stored)).convert("L")).astype(float)
    assert pixels.shape == (16, 16)
    assert pixels[7:9, 7:9].min() > 240
    centre = [(pixels.sum(axis) * np.arange(16)).sum() / pixels.sum() for axis in (0, 1)]
    assert centre == pytest.approx([7.5, 7.5], abs=0.6)  # whole pixels can be off by half of one
    if resize != "pad-lanczos":
        assert pixels.mean() / 255 == pytest.approx(np.pi / 16, abs=0.02)


def test_smaller_pictures_are_enlarged_only_when_asked() -> None:
    with pytest.raises(ValueError, match=r"16 x 16 pixels, smaller than 32; --enlarge would invent the rest"):
        pictures.encode(png(0, 16), Form(size=32))
    _, stored = pictures.encode(png(0, 16), Form(size=32, enlarge=True))
    assert Image.open(io.BytesIO(stored)).size == (32, 32)


@pytest.mark.parametrize("content", [b"", b"garbage", png(0, 32)[:-100], png(0, 32)[:30], pickle.dumps([1])])
def test_unreadable_pictures_are_named_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        pictures.decode(content)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no fixed range"):
        pictures.decode(bytes_of(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_pictures_over_the_pixel_limit_are_not_decoded() -> None:
    with pytest.raises(ValueError, match=r"32 x 32 pixels, above the limit of 1000"):
        pictures.decode(png(0, 32), max_pixels=1000)
