"""What the preparation of a domain's sets consists of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed_inr.data.layouts.item import Item

Layout = Callable[[Path, Path | None, Any], list[Item]]
"""From a folder, a caption file or none, and the form, to what there is."""


def _none(form: Any) -> int:
    return 0


def _nothing(items: Sequence[Item], form: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a domain's raw data are found and become records.

    Attributes:
        layouts: by name, the ways in which they lie on disks; the first is the default.
        splits: by layout, what is held out together unless one asks for something else or the layout has parts.
        form: a dataclass of `raw.option` fields: how they are brought to one kind of record.
        convert: what `Item.load` gives, and the form, to a record's members. Raises ValueError where it cannot be used.
        statistics: of the training items, what the set's protocol must say beside the plan.
        overlap: for a form, how many items after one share a part of it, as windows of one recording do.
        noun: what one of them is called.
        files: suffixes, for messages.
    """

    domain: str
    layouts: Mapping[str, Layout]
    form: type[Any]
    convert: Callable[[Any, Any], dict[str, bytes]]
    noun: str
    files: tuple[str, ...]
    splits: Mapping[str, str] = field(default_factory=dict)
    statistics: Callable[[Sequence[Item], Any], dict[str, Any]] = _nothing
    overlap: Callable[[Any], int] = _none
