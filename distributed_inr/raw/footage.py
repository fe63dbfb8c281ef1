"""Videos, animations and folders of pictures as frames: counted first, decoded when asked for.

Whatever a file claims to hold is checked before anything of it is decoded, and nothing that it points to is opened.
"""

import io
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image

from distributed_inr.raw import pictures

MAX_PIXELS = 9_437_184
"""Largest frame that is decoded by default: 4096 x 2304; sixteen of them are 0.45 GB."""
MAX_FRAMES = 1_000_000
"""Longest file that is looked through by default: nine hours at 30 frames a second."""

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv")
ANIMATION_SUFFIXES = (".gif", ".webp")
FILE_SUFFIXES = VIDEO_SUFFIXES + ANIMATION_SUFFIXES
TICKS = {".gif": 10, ".webp": 1}
"""Milliseconds that the durations of an animation's pictures are whole multiples of."""

# Playlists and the like, whatever their suffix, would open other files and addresses.
_CONTAINER = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm", "protocol_whitelist": "file"}
_ANIMATIONS = {".gif": ("GIF",), ".webp": ("WEBP",)}
_UNEVEN = 1.5
"""Times the shortest interval that the longest may be; time stamps of whole milliseconds vary a little."""
_MAX_REPEATS = 100
"""Times that one picture of an animation may be shown in a row."""
_DECODERS_MARGIN = 1 << 20
"""Pixels by which decoders' buffers may be larger than the frame."""


class Footage(ABC):
    """The frames of a file or a folder in their order, counted and not decoded."""

    rate: float | None
    """Frames a second, where the file says."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def decode(self, numbers: range) -> Iterator[Image.Image]:
        """Some frames. Raises ValueError where they cannot be decoded or their intervals vary."""


def scan(path: Path, *, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES) -> Footage:
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
        """Pictures of twice or three times the shortest duration stand for equal frames, which writers join.

        Where they are no multiples of it, those a tick apart are of one rate: their mean is what the file's clock could
        not say.
        """
        lasting = []
        with _animation(path, max_pixels) as picture:
            if (count := getattr(picture, "n_frames", 1)) > max_frames:
                raise ValueError(f"{count} frames, more than {max_frames}; raise --max-frames")
            for number in range(count):
                picture.seek(number)
                picture.load()
                lasting.append(float(picture.info.get("duration") or 100))  # what viewers take for none
        durations, tick = np.array(lasting), TICKS[path.suffix.lower()]
        unit = shortest = durations.min()
        if _off(durations / shortest) > 0.25:
            unit = durations[durations <= max(1.25 * shortest, shortest + tick)].mean()
        repeats = durations / unit
        if repeats.max() > _MAX_REPEATS or (_off(repeats) > 0.25 and _off(repeats) >= tick / unit):
            raise ValueError(f"its frames last {shortest:g} to {durations.max():g} ms; bring it to one frame rate")
        seen = np.repeat(np.arange(len(durations)), repeats.round().astype(int))
        return Animation(path, tuple(seen.tolist()), float(1000 * len(seen) / durations.sum()), max_pixels)

    def __len__(self) -> int:
        return len(self.seen)

    def decode(self, numbers: range) -> Iterator[Image.Image]:
        with _animation(self.path, self.max_pixels) as picture:
            for number in numbers:
                picture.seek(self.seen[number])
                yield _on_white(picture)


def _off(numbers: np.ndarray) -> float:
    """How far numbers are from whole ones, at most."""
    return float(np.abs(numbers - numbers.round()).max())


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
            except OSError as error:
                raise ValueError(f"{file.name}: cannot be read: {error.strerror}") from None
            except ValueError as error:
                raise ValueError(f"{file.name}: {error}") from None


def decode_video(content: bytes, *, frames: int, size: int) -> UInt8[np.ndarray, "frames size size 3"]:
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
        if stream.codec_context is None:
            self.container.close()
            raise ValueError("there is no decoder for its video; convert it to H.264")
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
