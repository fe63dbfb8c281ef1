"""Raw files -> webdataset shards with indexes; verify and describe finished sets.

python jobs/prepare_data.py image ./my_images --out ./my_shards --size 128
python jobs/prepare_data.py image ./afhq_v2 --layout afhqv2 --only class=cat --size 256 --out s3://bucket/afhqv2-cat
python jobs/prepare_data.py verify ./my_shards/train
python jobs/prepare_data.py describe ./my_shards/train
"""

import argparse
import json
import sys
import typing
from pathlib import Path

from distributed_inr.config import Parser, command
from distributed_inr.data import layouts, pictures, prepare
from distributed_inr.domains.image import MAX_PIXELS


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    image = verbs.add_parser("image", help="pictures -> train and val shards", allow_abbrev=False)
    image.add_argument("source", type=Path, metavar="DIR", help="folder of raw pictures")
    image.add_argument(
        "--out", required=True, metavar="PATH", help="folder to write train/ and val/ to (local or s3://, gs://)"
    )
    described = "; ".join(f"{name}: {layout.__doc__}" for name, layout in layouts.LAYOUTS.items())
    image.add_argument("--layout", default="folder", choices=layouts.LAYOUTS, help=f"how DIR is organised. {described}")
    image.add_argument(
        "--metadata",
        type=Path,
        help="captions, JSON lines: file_name or key, text, class (default: metadata.jsonl in DIR or beside it)",
    )
    image.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FIELD=A,B",
        help="keep pictures whose class, text, object or other metadata has one of these values; may be repeated",
    )
    image.add_argument(
        "--split",
        default="auto",
        choices=typing.get_args(prepare.Split),
        help="what is held out together: "
        "text (a caption), object, fraction (single pictures), given (train/ and val/ folders), none (default: "
        "given if there, object for views, text if captions are, else fraction)",
    )
    image.add_argument(
        "--val-fraction", type=float, default=0.05, help="held-out fraction, chosen by hash (default: 0.05)"
    )
    image.add_argument("--val-per-class", type=int, help="hold out this many of each class instead")
    image.add_argument("--split-seed", type=int, default=0, help="another number holds out others (default: 0)")
    image.add_argument("--size", type=int, help="side in pixels; smaller pictures are left out (default: as they are)")
    image.add_argument(
        "--protocol",
        default="center-crop-lanczos",
        choices=typing.get_args(pictures.Resize),
        help="how pictures are brought to --size; recorded in index.json (default: center-crop-lanczos)",
    )
    image.add_argument("--enlarge", action="store_true", help="enlarge pictures smaller than --size too")
    image.add_argument(
        "--encoding",
        default="keep",
        choices=typing.get_args(pictures.Encoding),
        help="keep: the file's own bytes where no pixel changes, else PNG; webp is lossless (default: keep)",
    )
    image.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help=f"leave out larger pictures undecoded (default: {MAX_PIXELS})",
    )
    image.add_argument("--shard-mb", type=float, default=256.0, help="largest shard in MB (default: 256)")
    image.add_argument("--shard-samples", type=int, default=10_000, help="most samples in a shard (default: 10000)")
    image.add_argument("--workers", type=int, default=2, help="threads (default: 2)")

    for verb, text in (("verify", "check every checksum and key of a set"), ("describe", "say what a set holds")):
        verbs.add_parser(verb, help=text).add_argument(
            "path", metavar="PATH", help="folder, pattern or address of shards"
        )

    arguments = parser.parse_args()
    {"image": make_images, "verify": verify, "describe": describe}[arguments.verb](arguments)


def make_images(arguments: argparse.Namespace) -> None:
    only = {}
    for rule in arguments.only:
        name, equals, values = rule.partition("=")
        if not equals:
            raise ValueError(f"--only {rule!r} must be FIELD=A,B, such as class=chair,table")
        only[name] = tuple(values.split(","))
    plan = prepare.Plan(
        layout=arguments.layout,
        only=only,
        split=arguments.split,
        val_fraction=arguments.val_fraction,
        val_per_class=arguments.val_per_class,
        split_seed=arguments.split_seed,
        shape=pictures.Shape(
            size=arguments.size,
            resize=arguments.protocol,
            enlarge=arguments.enlarge,
            encoding=arguments.encoding,
            max_pixels=arguments.max_pixels,
        ),
        shard_bytes=int(arguments.shard_mb * 1e6),
        shard_samples=arguments.shard_samples,
    )
    made = prepare.prepare_images(
        arguments.source, arguments.out, plan, metadata=arguments.metadata, workers=arguments.workers
    )
    for part, index in made.parts.items():
        print(f"{part}: {index.num_samples} pictures, {len(index.shards)} shards, {index.num_bytes / 1e6:.1f} MB")
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
