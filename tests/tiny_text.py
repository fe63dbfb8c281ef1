"""Tiny pictures with captions, and the options of a run on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_domains import DOMAINS, RECORDS, tiny_experiment

from distributed_inr.config import override
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.experiment import Experiment

CAPTIONS = ["a chair\nchair", "a round  table\ntable\na chair", "", "a lamp", "a chair", "椅子"]
DISTINCT = {"", "a chair", "chair", "a round table", "table", "a lamp", "椅子"}


def write_captioned(folder: Path, captions: Sequence[str], classes: Sequence[str] = ()) -> None:
    """A set of tiny pictures, with captions and perhaps classes."""
    writer = ShardWriter(folder, domain="image", protocol={"made": "for tests"})
    for number, text in enumerate(captions):
        record: dict[str, Any] = {"__key__": f"{number:04d}", **RECORDS["image"](DOMAINS["image"], number)}
        record |= {"txt": text.encode()} if text else {}
        record |= {"json": json.dumps({"class": classes[number]}).encode()} if classes else {}
        writer.write(record)
    writer.close()


def text_experiment(folder: Path, text: Any, family: str = "ddmi", **changes: Any) -> Experiment:
    """A tiny run on the sets `train` and `val` of the folder, with a text encoder's configuration."""
    given = {f"text.{name}": value for name, value in vars(text).items() if not name.startswith("_")}
    return override(tiny_experiment("image", family, folder), given | changes)
