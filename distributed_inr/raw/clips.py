"""Clips of 8-bit RGB frames: cut from footage, packed as members of shards, and written as files."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image, ImageOps

from distributed_inr.raw import option
from distributed_inr.raw.footage import MAX_FRAMES, MAX_PIXELS, TICKS, Footage

Frames = UInt8[np.ndarray, "frames height width 3"]
Frame = UInt8[np.ndarray, "height width 3"]

WRITTEN_SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")

_MOST_RATES = {".gif": 50, ".webp": 90}
"""Frames a second: players show pictures of 10 ms and less for 100."""
_WEBP_SIDE = 16_383
_SHEET_COLUMNS = 4


@dataclass(frozen=True)
class Form:
    """How clips are cut from files and brought to one size; recorded in `index.json`."""

    frames: int = option(16, "frames of a clip")
    stride: int | None = option(
        None,
        "frames of the file from the start of one clip to that of the next (default: as many as a clip spans)",
    )
    step: int = option(1, "1 takes every frame of the file, 2 every second one, and so on")
    size: int | None = option(
        None,
        "side in pixels: the central square, reduced by Lanczos; smaller clips are left out (default: as they are)",
    )
    encoding: Literal["webp", "png", "mp4"] = option(
        "webp",
        "webp and png lose nothing: the frames below each other as one picture; mp4 is smaller and loses a little",
    )
    max_pixels: int = option(MAX_PIXELS, "leave out files with larger frames undecoded")
    max_frames: int = option(MAX_FRAMES, "leave out longer files")

    def __post_init__(self) -> None:
        for name in ("frames", "stride", "step", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")

    @property
    def span(self) -> int:
        """Frames of the file from the first to the last of a clip."""
        return (self.frames - 1) * self.step + 1


def cut(source: Footage, start: int, form: Form) -> Frames:
    """The clip that begins at frame `start`. Raises ValueError where there is none, or its frames differ in size."""
    if start + form.span > len(source):
        raise ValueError(f"{len(source)} frames, fewer than the {start + form.span} of a clip; ask for shorter clips")
    clip: np.ndarray | None = None
    shape: tuple[int, int] | None = None
    for number, picture in enumerate(source.decode(range(start, start + form.span, form.step))):
        if shape is not None and picture.size != shape:
            width, height = picture.size
            raise ValueError(f"its frames change from {shape[0]} x {shape[1]} pixels to {width} x {height}")
        shape = picture.size
        if form.size is not None and picture.size != (form.size, form.size):
            if min(picture.size) < form.size:
                raise ValueError(f"{shape[0]} x {shape[1]} pixels, smaller than {form.size}; ask for smaller clips")
            picture = ImageOps.fit(picture, (form.size, form.size), Image.Resampling.LANCZOS)
        if clip is None:
            clip = np.empty((form.frames, picture.height, picture.width, 3), dtype=np.uint8)
        clip[number] = np.asarray(picture)
    assert clip is not None
    return clip


def encode(clip: Frames, form: Form) -> tuple[str, bytes]:
    """Member suffix and bytes of a clip.

    The frames below each other as one lossless picture: exact, one decoder's work, and its size can be checked before
    it is decoded. Lossless video would be smaller, but needs profiles that few decoders have.
    """
    frames, height, width, _ = clip.shape
    file = io.BytesIO()
    if form.encoding == "mp4":
        _write_video(clip, file, "mp4", 12.0)
        return "clip.mp4", file.getvalue()
    if form.encoding == "webp" and max(frames * height, width) > _WEBP_SIDE:
        raise ValueError(f"{frames} frames of {height} pixels are too high for one WebP; use --encoding png or mp4")
    strip = Image.fromarray(clip.reshape(frames * height, width, 3))
    if form.encoding == "webp":
        strip.save(file, "WEBP", lossless=True, method=6)
    else:
        strip.save(file, "PNG", optimize=True)
    return f"clip.{form.encoding}", file.getvalue()


def write(frames: Iterable[Frame], path: Path, *, rate: float) -> None:
    """Write frames as the suffix says: MP4, WebM, GIF, WebP, or PNG for a sheet of them.

    They are taken one by one, and of a video only few are held; of a GIF all are, in its 256 colours. Animations join
    equal frames, and keep the duration of the whole: each frame begins at its time to half a tick of the file's clock.
    """
    suffix = path.suffix.lower()
    check_rate(suffix, rate)
    if suffix in (".mp4", ".webm"):
        with path.open("wb") as file:
            _write_video(frames, file, suffix[1:], rate)
    elif suffix in TICKS:
        _write_animation(frames, path, rate)
    elif suffix == ".png":
        sheet(list(frames)).save(path)
    else:
        raise ValueError(f"{path.name}: clips are written as {', '.join(WRITTEN_SUFFIXES)}; use one of these suffixes")


def check_rate(suffix: str, rate: float) -> None:
    """Raise ValueError where players show files of this kind more slowly than they say."""
    most = _MOST_RATES.get(suffix)
    if most is not None and rate > most:
        raise ValueError(
            f"{rate:g} frames a second: players slow {suffix} down above {most}; write .mp4, or fewer frames a second"
        )


def sheet(frames: Sequence[Frame], columns: int = _SHEET_COLUMNS) -> Image.Image:
    """Frames row by row as one picture."""
    height, width, _ = frames[0].shape
    columns = min(columns, len(frames))
    result = Image.new("RGB", (columns * width, -(-len(frames) // columns) * height), "white")
    for number, frame in enumerate(frames):
        result.paste(Image.fromarray(frame), (number % columns * width, number // columns * height))
    return result


def _write_animation(frames: Iterable[Frame], path: Path, rate: float) -> None:
    suffix = path.suffix.lower()
    tick = TICKS[suffix]

    def timed() -> Iterator[Image.Image]:
        for number, frame in enumerate(frames):
            picture = Image.fromarray(frame)
            start, end = (round(place * 1000 / (rate * tick)) * tick for place in (number, number + 1))
            picture.info["duration"] = end - start
            yield picture

    pictures = timed()
    first = next(pictures)
    if suffix == ".gif":
        try:
            first.save(path, save_all=True, append_images=pictures, loop=0, disposal=1)
        except OverflowError:
            raise ValueError(
                f"{path.name}: one picture is seen for more than 655 s, which no GIF can say; write .mp4"
            ) from None
    else:
        others = list(pictures)
        durations = [picture.info["duration"] for picture in (first, *others)]
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=90)


def _write_video(frames: Iterable[Frame], file: io.BufferedIOBase, container: str, rate: float) -> None:
    with av.open(file, "w", format=container) as output:
        codec, options = {
            "mp4": ("libx264", {"crf": "10", "preset": "medium"}),
            "webm": ("libvpx-vp9", {"crf": "18", "b": "0", "deadline": "good", "cpu-used": "4"}),
        }[container]
        stream: Any = output.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
        for number, pixels in enumerate(frames):
            # Half as many colours a side (4:2:0, which every player has) need even sides: the last line is repeated.
            height, width, _ = pixels.shape
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if number == 0:
                stream.width, stream.height, stream.pix_fmt = pixels.shape[1], pixels.shape[0], "yuv420p"
                context = stream.codec_context
                # BT.709, said aloud: players guess by the size where nothing is said, and colours shift.
                context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
                try:
                    context.open()
                except FFmpegError:
                    raise ValueError(
                        f"{width} x {height} pixels cannot be written as {container}: the encoder takes no such size; "
                        "reduce them, or use another kind"
                    ) from None
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            output.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="itu709")))
        output.mux(stream.encode())
