"""Raw files -> webdataset shards with indexes; verify and describe finished sets.

python jobs/prepare_data.py image ./my_images --out ./my_shards --size 128
python jobs/prepare_data.py image ./afhq_v2 --layout afhqv2 --only class=cat --size 256 --out s3://bucket/afhqv2-cat
python jobs/prepare_data.py verify ./my_shards/train
python jobs/prepare_data.py describe ./my_shards/train
"""

import argparse
import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from distributed_inr.config import Parser, command
from distributed_inr.data import prepare
from distributed_inr.data.layouts import SOURCES, Source


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for source in SOURCES.values():
        verb = verbs.add_parser(source.domain, help=f"{source.noun}s -> train and val shards", allow_abbrev=False)
        add_options(verb, source)
    for name, text in (("verify", "check every checksum and key of a set"), ("describe", "say what a set holds")):
        verbs.add_parser(name, help=text).add_argument(
            "path", metavar="PATH", help="folder, pattern or address of shards"
        )
    arguments = parser.parse_args()
    {"verify": verify, "describe": describe}.get(arguments.verb, make)(arguments)


def add_options(verb: argparse.ArgumentParser, source: Source) -> None:
    verb.add_argument("source", type=Path, metavar="DIR", help=f"folder of raw {source.noun}s")
    verb.add_argument(
        "--out", required=True, metavar="PATH", help="folder to write train/ and val/ to (local or s3://, gs://)"
    )
    first, described = next(iter(source.layouts)), []
    for name, layout in source.layouts.items():
        described.append(f"{name}: {' '.join((layout.__doc__ or '').split())}")
    verb.add_argument(
        "--layout", default=first, choices=source.layouts, help=f"how DIR is organised. {'; '.join(described)}"
    )
    verb.add_argument(
        "--metadata",
        type=Path,
        help="captions, JSON lines or .csv: file_name or key, text, class, as docs/data.md describes them (default: "
        "metadata.jsonl in DIR or beside it)",
    )
    verb.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FIELD=A,B",
        help=f"keep {source.noun}s whose class, text, object or other metadata has one of these values; repeatable",
    )
    verb.add_argument(
        "--caption",
        action="append",
        default=[],
        metavar="TEMPLATE",
        help="make captions, in place of the own ones, such as 'a {size} {class}' or '{text}, {category}': of what the "
        "metadata say, and the words {size}, {height}, {width} for the outer thirds of a class; repeatable",
    )
    own = "".join(f", {split} for {layout}" for layout, split in source.splits.items())
    verb.add_argument(
        "--split",
        default="auto",
        choices=typing.get_args(prepare.Split),
        help="what is held out together: text (a caption), object, time (the last of each object, or of the files in "
        "their order), fraction (single items), given (train/ and val/ folders), none (default: given if there"
        f"{own}, text if captions are, else fraction)",
    )
    verb.add_argument(
        "--val-fraction", type=float, default=0.05, help="held-out fraction, chosen by hash (default: 0.05)"
    )
    verb.add_argument("--val-per-class", type=int, help="hold out this many of each class instead")
    verb.add_argument(
        "--val-gap", type=int, default=1, help="with --split time, items left out before the held-out ones (default: 1)"
    )
    verb.add_argument("--split-seed", type=int, default=0, help="another number holds out others (default: 0)")
    hints = typing.get_type_hints(source.form)
    for option in dataclasses.fields(source.form):
        add_option(verb, option, hints[option.name])
    verb.add_argument("--shard-mb", type=float, default=256.0, help="largest shard in MB (default: 256)")
    verb.add_argument("--shard-samples", type=int, default=10_000, help="most samples in a shard (default: 10000)")
    verb.add_argument("--workers", type=int, default=2, help="threads (default: 2)")


def add_option(verb: argparse.ArgumentParser, option: dataclasses.Field[Any], hint: Any) -> None:
    """The flag of a form's field."""
    flag = "--" + option.name.replace("_", "-")
    text = option.metadata["help"].replace("%", "%%")
    if "default" not in text and hint is not bool:
        text += f" (default: {option.default})"
    if hint is bool:
        verb.add_argument(flag, action="store_true", help=text)
        return
    if isinstance(hint, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is typing.Literal:
        verb.add_argument(flag, default=option.default, choices=typing.get_args(hint), help=text)
    else:
        verb.add_argument(flag, default=option.default, type=hint, help=text)


def make(arguments: argparse.Namespace) -> None:
    only = {}
    for rule in arguments.only:
        name, equals, values = rule.partition("=")
        if not equals:
            raise ValueError(f"--only {rule!r} must be FIELD=A,B, such as class=chair,table")
        only[name] = tuple(values.split(","))
    source = SOURCES[arguments.verb]
    plan = prepare.Plan(
        domain=source.domain,
        layout=arguments.layout,
        only=only,
        split=arguments.split,
        val_fraction=arguments.val_fraction,
        val_per_class=arguments.val_per_class,
        val_gap=arguments.val_gap,
        split_seed=arguments.split_seed,
        captions=tuple(arguments.caption),
        form=source.form(
            **{option.name: getattr(arguments, option.name) for option in dataclasses.fields(source.form)}
        ),
        shard_bytes=int(arguments.shard_mb * 1e6),
        shard_samples=arguments.shard_samples,
    )
    made = prepare.prepare_set(
        arguments.source, arguments.out, plan, metadata=arguments.metadata, workers=arguments.workers
    )
    for part, index in made.parts.items():
        print(f"{part}: {index.num_samples} {source.noun}s, {len(index.shards)} shards, {index.num_bytes / 1e6:.1f} MB")
    if made.skipped:
        print(
            f"left out {len(made.skipped)}, listed in {arguments.out}/skipped.txt; first: {': '.join(made.skipped[0])}"
        )
    print(arguments.out)


def verify(arguments: argparse.Namespace) -> None:
    problems = prepare.verify(arguments.path)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise ValueError(f"{arguments.path}: {len(problems)} problems; restore those shards or prepare the set again")
    print(f"{arguments.path}: every checksum is right and no key occurs twice")


def describe(arguments: argparse.Namespace) -> None:
    print(json.dumps(prepare.describe(arguments.path), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
