"""Caption files: what is known of raw items beside their content."""

import collections
import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distributed_inr.data.layouts.item import Item, lines_of, with_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """What a caption file says of one item.

    Attributes:
        key: names an item, or an object.
        file: names a file, seen from the caption file's folder.
        model: where neither does, names what lies in a folder or file of that name, as ShapeNet's sets have it.
        texts: captions; None where the file has no such field.
        about: everything else.
    """

    key: str | None
    file: str | None
    model: str | None
    texts: tuple[str, ...] | None
    about: Mapping[str, Any]


def described(items: list[Item], root: Path, metadata: Path | None) -> list[Item]:
    """Items, of a file each, with what the caption file says of them, or with the first folder's name as class and
    caption where there is none.
    """
    table = read_metadata(root, metadata)
    if table is None:
        return [with_class(item, item.key.split("/")[0]) if "/" in item.key else item for item in items]
    place, rows = table

    def named(row: Row) -> list[str]:
        names = [row.key] if row.key is not None else []  # of what was made of the file that it also names, perhaps
        if row.file is not None:
            path = Path(os.path.normpath(place.parent / row.file))
            if path.is_relative_to(root):
                names.insert(0, path.relative_to(root).as_posix())
            elif not any(name in numbers for name in names):
                return []  # the file lies beside a folder that also holds other things
        return names

    numbers = {item.name: [i] for i, item in enumerate(items)} | {item.key: [i] for i, item in enumerate(items)}
    return _with_rows(items, [(named(row), row) for row in rows], numbers, place, root)


def described_objects(items: list[Item], root: Path, metadata: Path | None) -> list[Item]:
    """Items with what the caption file says of the objects that they show; a row's key is the object's."""
    table = read_metadata(root, metadata)
    if table is None:
        return items
    place, rows = table
    numbers: dict[str, list[int]] = collections.defaultdict(list)
    for number, item in enumerate(items):
        for name in {item.unit, item.name}:
            numbers[name].append(number)
    pairs = [([name for name in (row.key, row.file) if name is not None][:1], row) for row in rows]
    return _with_rows(items, pairs, numbers, place, root)


def _with_rows(
    items: list[Item], rows: list[tuple[list[str], Row]], numbers: Mapping[str, list[int]], place: Path, root: Path
) -> list[Item]:
    """Items with the rows that describe them, by the first of each row's names that there is."""
    models: dict[str, list[int]] = collections.defaultdict(list)
    if any(row.model is not None for _, row in rows):
        for number, item in enumerate(items):
            for part in set(item.unit.split("/")):
                models[part].append(number)
    own: dict[int, list[Row]] = collections.defaultdict(list)
    missing: dict[str, None] = {}
    absent: dict[str, None] = {}
    for names, row in rows:
        if row.model is not None:
            found = models.get(row.model, [])
            if not found:
                absent[row.model] = None
        else:
            found = next((numbers[name] for name in names if name in numbers), [])
            if names and not found:
                missing[names[0]] = None
        for number in found:
            own[number].append(row)
    if missing:
        raise ValueError(
            f"{place.name} names {len(missing)} files that are not in {root}, first {next(iter(missing))!r}; "
            "restore them or remove those lines"
        )
    if absent:
        _check_models(list(absent), rows, place, root)
    return [_with_row(item, own[number]) if number in own else item for number, item in enumerate(items)]


def _check_models(absent: list[str], rows: list[tuple[list[str], Row]], place: Path, root: Path) -> None:
    """Models that are not there are passed over, for such a table is about a whole collection; but some must be."""
    count = len({row.model for _, row in rows if row.model is not None})
    if len(absent) == count:
        raise ValueError(
            f"{place.name} names {count} models, none of them in {root}, first {absent[0]!r}; give the table of this "
            "collection: its models are looked for as names of folders and files"
        )
    logger.info("%s: %d of its %d models are not in %s and passed over", place.name, len(absent), count, root)


def _with_row(item: Item, rows: list[Row]) -> Item:
    """An item with what one or several rows say: their captions, or its class where they have none to say."""
    about = dict(item.about)
    for row in rows:
        about |= row.about
    texts = [row.texts for row in rows if row.texts is not None]
    if texts:
        captions = lines_of(text for own in texts for text in own)
    elif any("class" in row.about for row in rows):
        captions = lines_of([str(about["class"] or "")])
    else:
        captions = item.captions
    return replace(item, captions=captions, about=about)


def read_metadata(root: Path, given: Path | None) -> tuple[Path, list[Row]] | None:
    """The caption file and its rows: the given one, or metadata.jsonl in the folder or beside it."""
    path = given or next((p for p in (root / "metadata.jsonl", root.parent / "metadata.jsonl") if p.is_file()), None)
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(
            f"--metadata {path} is not a file; give a JSON-lines or .csv file with file_name or key, and text"
        )
    table = path.suffix.lower() == ".csv"
    try:
        rows = [_row(path, number, values, table) for number, values in (_csv if table else _json_lines)(path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    return path.absolute(), rows


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; give one object a line") from None


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with a header; an empty cell is a field that the row has not."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                if None in values:
                    raise csv.Error(f"more cells than the header's {len(reader.fieldnames or [])}")
                yield reader.line_num, {name: value for name, value in values.items() if name and value}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.reader.line_num} is no row of a table: {error}; mend it") from None


def _row(path: Path, number: int, values: Any, table: bool) -> Row:
    about = dict(values) if isinstance(values, dict) else {}
    if all(about.get(name) is None for name in ("key", "file_name", "modelId")):
        raise ValueError(f"{path}, line {number} has neither file_name, key nor modelId; name what it describes")
    key, file, model, text = about.pop("key", None), about.pop("file_name", None), None, "text"
    if key is None and file is None:
        model = about.pop("modelId", None)
        about.pop("id", None)  # of the row: Text2Shape's tables have several of each model
    if text not in about and (table or model is not None):
        text = "description"
    texts = None
    if text in about:
        own = about.pop(text)
        texts = tuple(own) if isinstance(own, list) else (own,)
        if any(isinstance(one, dict | list) for one in texts):
            raise ValueError(f"{path}, line {number}: {text} must be a string or a list of strings")
        texts = tuple(str(one or "") for one in texts)
    key, file, model = (None if name is None else str(name) for name in (key, file, model))
    return Row(key, file, model, texts, about)
