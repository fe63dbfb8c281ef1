"""Pictures of all kinds of files as 8-bit RGB: rotation, transparency, bit depth, size. Used when preparing a set."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from distributed_inr.raw import option

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded by default: Pillow's own limit, a quarter of a GiB as RGB."""

FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

Resize = Literal["center-crop-lanczos", "center-crop-area", "pad-lanczos"]
Encoding = Literal["keep", "png", "webp", "jpg"]

_DECODERS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no others, whatever a file claims to be
_SUFFIX_OF = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class Form:
    """How pictures are brought to one size; recorded in `index.json`."""

    size: int | None = option(None, "side in pixels; smaller pictures are left out (default: as they are)")
    protocol: Resize = option(
        "center-crop-lanczos",
        "how pictures are brought to --size. center-crop-lanczos: the central square, reduced by Lanczos; "
        "center-crop-area: halved by 2 x 2 means as often as possible, then bicubic, then cropped, as in the published "
        "diffusion code; pad-lanczos: the whole picture on white",
    )
    enlarge: bool = option(False, "enlarge pictures smaller than --size too")
    encoding: Encoding = option(
        "keep", "keep: the file's own bytes where no pixel changes, else PNG; png and webp lose nothing"
    )
    max_pixels: int = option(MAX_PIXELS, "leave out larger pictures undecoded")

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"--size {self.size} must be at least 1 pixel")


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of a picture file, upright, on white, 8-bit RGB. Raises ValueError when it cannot be read."""
    picture, _ = _open(content, max_pixels)
    return picture


def encode(content: bytes | Image.Image, form: Form) -> tuple[str, bytes]:
    """Member suffix and bytes of a picture brought to `form`. Raises ValueError when it cannot be used."""
    if isinstance(content, Image.Image):
        picture, kept = content.convert("RGB"), None
    else:
        picture, kept = _open(content, form.max_pixels)
    if form.size is not None and picture.size != (form.size, form.size):
        picture, kept = _resize(picture, form.size, form), None
    if form.encoding == "keep" and kept is not None and not isinstance(content, Image.Image):
        return kept, content
    suffix = "png" if form.encoding == "keep" else form.encoding
    options = {"png": {"optimize": True}, "webp": {"lossless": True, "method": 6}, "jpg": {"quality": 95}}
    file = io.BytesIO()
    picture.save(file, {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[suffix], **options[suffix])
    return suffix, file.getvalue()


def _open(content: bytes, max_pixels: int) -> tuple[Image.Image, str | None]:
    """The picture, and its suffix when its own bytes already say all of that (so that they can be kept)."""
    try:
        with Image.open(io.BytesIO(content), formats=_DECODERS) as picture:
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"{picture.width} x {picture.height} pixels, above the limit of {max_pixels}")
            frames = getattr(picture, "n_frames", 1)
            upright = picture.getexif().get(0x0112, 1) == 1
            plain = picture.mode == "RGB" and frames == 1 and upright and not picture.has_transparency_data
            suffix = _SUFFIX_OF.get(picture.format or "") if plain else None
            return _to_rgb(ImageOps.exif_transpose(picture)), suffix
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(str(error).replace(" <_io.BytesIO object", "").split(" at 0x")[0]) from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey; Pillow would clip them
        values = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; convert the file to 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _resize(picture: Image.Image, size: int, form: Form) -> Image.Image:
    width, height = picture.size
    limiting = max(width, height) if form.protocol == "pad-lanczos" else min(width, height)
    if limiting < size and not form.enlarge:
        raise ValueError(f"{width} x {height} pixels, smaller than {size}; --enlarge would invent the rest")
    if form.protocol == "pad-lanczos":
        return ImageOps.pad(picture, (size, size), Image.Resampling.LANCZOS, color="white")
    if form.protocol == "center-crop-lanczos":
        return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))
