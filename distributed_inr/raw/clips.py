"""Videos, animations and folders of frames as 8-bit RGB clips, and clips as files.

Whatever a file claims to hold is checked before anything of it is decoded, and nothing that it points to is opened.
"""

import io
import itertools
import re
from abc import ABC, abstractmethod
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

from distributed_inr.raw import option, pictures

Frames = UInt8[np.ndarray, "frames height width 3"]
Frame = UInt8[np.ndarray, "height width 3"]

MAX_PIXELS = 9_437_184
"""Largest frame that is decoded by default: 4096 x 2304; sixteen of them are 0.45 GB."""
MAX_FRAMES = 1_000_000
"""Longest file that is looked through by default: nine hours at 30 frames a second."""

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
ANIMATION_SUFFIXES = (".gif", ".webp")
FILE_SUFFIXES = VIDEO_SUFFIXES + ANIMATION_SUFFIXES
WRITTEN_SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")

# Playlists and the like, whatever their suffix, would open other files and addresses.
_CONTAINER = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm", "protocol_whitelist": "file"}
_ANIMATIONS = {".gif": ("GIF",), ".webp": ("WEBP",)}
_UNEVEN = 1.5
"""Times the shortest interval that the longest may be; time stamps of whole milliseconds vary a little."""
_MAX_REPEATS = 100
"""Times that one picture of an animation may be shown in a row."""
_DECODERS_MARGIN = 1 << 20
"""Pixels by which decoders' buffers may be larger than the frame."""
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


class Footage(ABC):
    """The frames of a file or a folder in their order, counted and not decoded."""

    rate: float | None
    """Frames a second, where the file says."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def decode(self, numbers: range) -> Iterator[Image.Image]:
        """Some frames. Raises ValueError where they cannot be decoded or their intervals vary."""


def footage(path: Path, *, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES) -> Footage:
    """Look through a video, an animation or a folder of pictures. Raises ValueError when it is not usable."""
    if path.is_dir():
        files = sorted(
            (f for f in path.iterdir() if f.suffix.lower() in pictures.FILE_SUFFIXES and not f.name.startswith(".")),
            key=lambda file: natural(file.name),
        )
        return FrameFiles(tuple(files), max_pixels)
    if path.suffix.lower() in ANIMATION_SUFFIXES:
        return Animation.scan(path, max_pixels=max_pixels, max_frames=max_frames)
    return Video.scan(path, max_pixels=max_pixels, max_frames=max_frames)


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

    They are taken one by one: of a video, only few are held. GIF holds times in hundredths of a second, 256 colours a
    frame, and joins equal frames.
    """
    suffix = path.suffix.lower()
    if suffix in (".mp4", ".webm"):
        with path.open("wb") as file:
            _write_video(frames, file, suffix[1:], rate)
    elif suffix in _ANIMATIONS:
        first, *others = (Image.fromarray(frame) for frame in frames)
        kind: dict[str, Any] = {"quality": 90} if suffix == ".webp" else {"disposal": 1}
        first.save(path, save_all=True, append_images=others, duration=round(1000 / rate), loop=0, **kind)
    elif suffix == ".png":
        sheet(list(frames)).save(path)
    else:
        raise ValueError(f"{path.name}: clips are written as {', '.join(WRITTEN_SUFFIXES)}; use one of these suffixes")


def sheet(frames: Sequence[Frame], columns: int = _SHEET_COLUMNS) -> Image.Image:
    """Frames row by row as one picture."""
    height, width, _ = frames[0].shape
    columns = min(columns, len(frames))
    result = Image.new("RGB", (columns * width, -(-len(frames) // columns) * height), "white")
    for number, frame in enumerate(frames):
        result.paste(Image.fromarray(frame), (number % columns * width, number // columns * height))
    return result


def decode_video(content: bytes, *, frames: int, size: int) -> Frames:
    """A whole short MP4 of a known shape. Raises ValueError when it is another."""
    found = []
    with _opened(io.BytesIO(content), max_pixels=size * size) as (container, stream):
        for frame in itertools.islice(container.decode(stream), frames + 1):
            if (frame.width, frame.height) != (size, size) or frame.is_corrupt:
                raise ValueError(f"{frame.width} x {frame.height} pixels, or damaged")
            found.append(frame.to_ndarray(format="rgb24"))
    if len(found) != frames:
        raise ValueError(f"{'more' if len(found) > frames else 'fewer'} than {frames} frames")
    return np.stack(found)


def natural(name: str) -> list[str | int]:
    """A key that puts frame 2 before frame 10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Video(Footage):
    """A video file, by the time stamps of its frames."""

    path: Path
    stamps: tuple[int, ...]
    rate: float | None
    max_pixels: int

    @staticmethod
    def scan(path: Path, *, max_pixels: int, max_frames: int) -> "Video":
        """Read the packets, which is cheap: many containers do not say how many frames they have."""
        stamps: list[int] = []
        with _opened(path, max_pixels=max_pixels) as (container, stream):
            rate = None if stream.average_rate is None else float(stream.average_rate)
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.pts is None:
                    raise ValueError("its frames have no time stamps; convert it to MP4")
                stamps.append(packet.pts)
                if len(stamps) > max_frames:
                    raise ValueError(f"more than {max_frames} frames; raise --max-frames")
        return Video(path, tuple(sorted(stamps)), rate, max_pixels)

    def __len__(self) -> int:
        return len(self.stamps)

    def decode(self, numbers: range) -> Iterator[Image.Image]:
        _refuse_uneven(np.diff(self.stamps[numbers[0] : numbers[-1] + 1]))
        wanted = [self.stamps[number] for number in numbers]
        with _opened(self.path, max_pixels=self.max_pixels) as (container, stream):
            if numbers[0] > 0:
                container.seek(wanted[0], stream=stream)  # to the key frame before it
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts < wanted[0]:
                    continue
                if frame.pts > wanted[0] or frame.is_corrupt:
                    break
                picture = frame.to_image()
                yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture  # as phones hold them
                wanted.pop(0)
                if not wanted:
                    return
        raise ValueError(f"frame {numbers[-len(wanted)]} cannot be decoded; the file is damaged or cut short")


@dataclass(frozen=True)
class Animation(Footage):
    """A GIF or WebP animation: which of its pictures is seen at each of equal steps of time."""

    path: Path
    seen: tuple[int, ...]
    rate: float | None
    max_pixels: int

    @staticmethod
    def scan(path: Path, *, max_pixels: int, max_frames: int) -> "Animation":
        """Pictures of twice or three times the shortest duration stand for equal frames, which writers join."""
        durations = []
        with _animation(path, max_pixels) as picture:
            if (count := getattr(picture, "n_frames", 1)) > max_frames:
                raise ValueError(f"{count} frames, more than {max_frames}; raise --max-frames")
            for number in range(count):
                picture.seek(number)
                picture.load()
                durations.append(float(picture.info.get("duration") or 100))  # what viewers take for none
        unit = min(durations)
        repeats = np.array(durations) / unit
        if repeats.max() > _MAX_REPEATS or np.abs(repeats - repeats.round()).max() > 0.25:
            raise ValueError(f"its frames last {unit:g} to {max(durations):g} ms; bring it to one frame rate")
        seen = np.repeat(np.arange(len(durations)), repeats.round().astype(int))
        return Animation(path, tuple(seen.tolist()), 1000 / unit, max_pixels)

    def __len__(self) -> int:
        return len(self.seen)

    def decode(self, numbers: range) -> Iterator[Image.Image]:
        with _animation(self.path, self.max_pixels) as picture:
            for number in numbers:
                picture.seek(self.seen[number])
                yield _on_white(picture)


@dataclass(frozen=True)
class FrameFiles(Footage):
    """A folder of picture files, in the natural order of their names."""

    files: tuple[Path, ...]
    max_pixels: int
    rate: float | None = None

    def __len__(self) -> int:
        return len(self.files)

    def decode(self, numbers: range) -> Iterator[Image.Image]:
        for number in numbers:
            file = self.files[number]
            try:
                yield pictures.decode(file.read_bytes(), max_pixels=self.max_pixels)
            except (OSError, ValueError) as error:
                raise ValueError(f"{file.name}: {error}") from None


class _opened:
    """A video's container and its stream; whatever the decoder raises inside becomes a ValueError."""

    def __init__(self, file: Path | io.BytesIO, *, max_pixels: int) -> None:
        self.file, self.max_pixels = file, max_pixels

    def __enter__(self) -> tuple[Any, Any]:
        try:
            source = str(self.file) if isinstance(self.file, Path) else self.file
            self.container = av.open(source, options=_CONTAINER)
        except (FFmpegError, OSError) as error:
            raise ValueError(f"cannot be opened: {error.strerror}") from None
        if not self.container.streams.video:
            self.container.close()
            raise ValueError("it has no video")
        stream = self.container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > self.max_pixels:
            self.container.close()
            raise ValueError(f"{width} x {height} pixels, above the limit of {self.max_pixels}")
        # The stream may disagree with its container: the decoder has the limit too, and does not paint over damage.
        limit = self.max_pixels + _DECODERS_MARGIN
        stream.codec_context.options = {"max_pixels": str(limit), "err_detect": "explode"}
        stream.codec_context.thread_count = 1
        return self.container, stream

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.container.close()
        if isinstance(error, FFmpegError):
            raise ValueError(f"cannot be decoded: {error.strerror}") from None


class _animation:
    """An animation opened by its one decoder; whatever that raises inside becomes a ValueError."""

    def __init__(self, path: Path, max_pixels: int) -> None:
        self.path, self.max_pixels = path, max_pixels

    def __enter__(self) -> Image.Image:
        try:
            self.picture = Image.open(self.path, formats=_ANIMATIONS[self.path.suffix.lower()])
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from None
        except Exception:  # decoders of damaged files raise nearly anything, with paths in it
            raise ValueError("cannot be opened") from None
        width, height = self.picture.size
        if width * height > self.max_pixels:
            self.picture.close()
            raise ValueError(f"{width} x {height} pixels, above the limit of {self.max_pixels}")
        return self.picture

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.picture.close()
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            raise ValueError(f"cannot be decoded: {error}") from None


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    shown = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def _refuse_uneven(intervals: np.ndarray) -> None:
    if len(intervals) and intervals.max() > _UNEVEN * intervals.min():
        times = intervals.max() / max(intervals.min(), 1)
        raise ValueError(f"its frame rate varies by a factor of {times:.1f}; bring it to one frame rate")


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
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            output.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="itu709")))
        output.mux(stream.encode())
