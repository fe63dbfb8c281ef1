"""Caption files: what is known of raw items beside their content."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed_inr.data.layouts.item import Item, with_class


def read_metadata(root: Path, given: Path | None) -> tuple[Path, list[dict[str, Any]]] | None:
    """The caption file: the given one, or metadata.jsonl in the folder or beside it."""
    path = given or next((p for p in (root / "metadata.jsonl", root.parent / "metadata.jsonl") if p.is_file()), None)
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"--metadata {path} is not a file; give a JSON-lines file with file_name or key, and text")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; give one object a line") from None
        if not isinstance(row, dict) or not row.keys() & {"file_name", "key"}:
            raise ValueError(f"{path}, line {number} has neither file_name nor key; name the picture it describes")
        rows.append(row)
    return path.absolute(), rows


def refuse_missing(missing: list[str], metadata: Path, root: Path) -> None:
    if missing:
        raise ValueError(
            f"{metadata.name} names {len(missing)} files that are not in {root}, first {missing[0]!r}; "
            "restore them or remove those lines"
        )


def described(items: list[Item], root: Path, metadata: Path | None) -> list[Item]:
    """Items with captions from metadata.jsonl, or with the first folder's name as class and caption."""
    rows = read_metadata(root, metadata)
    if rows is None:
        return [with_class(item, item.key.split("/")[0]) if "/" in item.key else item for item in items]
    place, table = rows
    found = list(items)
    by_name = {item.name: i for i, item in enumerate(items)} | {item.key: i for i, item in enumerate(items)}
    missing: list[str] = []
    for row in table:
        names = [str(row["key"])] if "key" in row else []  # of what was made of the file that it also names, perhaps
        if "file_name" in row:
            path = Path(os.path.normpath(place.parent / row["file_name"]))
            if path.is_relative_to(root):
                names.insert(0, path.relative_to(root).as_posix())
            elif not any(name in by_name for name in names):
                continue  # the file lies beside a folder that also holds other things
        number = next((by_name[name] for name in names if name in by_name), None)
        if number is None:
            missing.append(names[0])
        else:
            found[number] = with_row(found[number], row)
    refuse_missing(missing, place, root)
    return found


def with_row(item: Item, row: Mapping[str, Any]) -> Item:
    about = {name: value for name, value in row.items() if name not in ("key", "file_name", "text")}
    text = str(row.get("text", row.get("class", "")) or "")
    return replace(item, text=text, about={**item.about, **about})
