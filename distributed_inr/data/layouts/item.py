"""Raw items: what a layout finds on disks, with key, caption, class, object and part, not read yet."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

Part = Literal["train", "val"]

PARTS: dict[str, Part] = {"train": "train", "val": "val", "validation": "val", "test": "val"}
"""What names of folders say of the items below them."""


@dataclass(frozen=True)
class Item:
    """One raw picture, mesh, clip, ..., not read yet.

    Attributes:
        key: its sample key.
        name: how messages name it: the path inside the source.
        load: reads it, as its domain's `Source.convert` takes it.
        size: bytes of the file, so that a rerun notices a changed source.
        captions: what says in words what it shows, as `lines_of` leaves them; become the record's txt.
        unit: the object it shows or the file it is cut from; items of one stay together when split by object.
        part: train or val where the layout says so.
        about: what else is known, such as "class"; becomes the record's json.
    """

    key: str
    name: str
    load: Callable[[], Any]
    size: int = 0
    captions: tuple[str, ...] = ()
    unit: str = ""
    part: Part | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Its first caption: what it is called where sets are split or chosen from."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Unusable:
    """`Item.load` of what is known to be of no use before it is read."""

    reason: str

    def __call__(self) -> NoReturn:
        raise ValueError(self.reason)


def walk(root: Path, suffixes: tuple[str, ...]) -> list[Item]:
    """The files of a tree with one of these suffixes, by name."""
    files = (Path(place, name) for place, _, names in os.walk(root) for name in names)
    items = [item_of(root, f) for f in files if f.suffix.lower() in suffixes and not f.name.startswith(".")]
    items.sort(key=lambda item: item.name)
    seen: set[str] = set()
    for index, item in enumerate(items):
        if item.key in seen:  # a.png beside a.jpg: the suffix tells them apart
            suffix = Path(item.name).suffix[1:].lower()
            items[index] = item = replace(item, key=f"{item.key}-{suffix}")
        seen.add(item.key)
    return items


def item_of(root: Path, file: Path) -> Item:
    """A file, by its path inside the source; one below train/, val/ or test/ belongs to that part."""
    path = file.relative_to(root)
    parts = path.with_suffix("").as_posix().split("/")
    key = "/".join([*parts[:-1], parts[-1].replace(".", "_")])  # webdataset's keys end at the first dot
    part = PARTS.get(parts[0].lower())
    return Item(key, path.as_posix(), _Content(file), size_of(file), unit=key, part=part)


def size_of(file: Path) -> int:
    """Bytes of a file; 0 of one that cannot be asked, such as a link to nowhere: reading it says why."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class _Content:
    file: Path

    def __call__(self) -> bytes:
        return content_of(self.file)


def content_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def lines_of(captions: Iterable[str]) -> tuple[str, ...]:
    """Each caption as one line, without blank ones and repetitions."""
    return tuple(dict.fromkeys(line for line in (" ".join(caption.split()) for caption in captions) if line))


def with_class(item: Item, name: str) -> Item:
    return replace(item, captions=lines_of([in_words(name)]), about={**item.about, "class": name})


def in_words(name: str) -> str:
    """A class's name, perhaps of a folder, as it stands in captions."""
    return name.replace("_", " ").replace("-", " ")


def select(items: Iterable[Item], wanted: Mapping[str, tuple[str, ...]]) -> list[Item]:
    """The items whose fields (text, part, or any of `about`) have one of the wanted values."""

    def value(item: Item, name: str) -> str:
        own = {"text": item.text, "part": item.part, "object": item.unit}
        return str(own[name] if name in own else item.about.get(name))

    return [item for item in items if all(value(item, name) in values for name, values in wanted.items())]
