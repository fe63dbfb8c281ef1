"""One's own pictures as functions: encode them with a finished run and write them at any resolution.

python jobs/reconstruct.py runs/ddmi/furniture-image chair.png table.jpg --resolution 1024
"""

import argparse
from pathlib import Path

from distributed_inr.config import Parser, command
from distributed_inr.generation import load, reconstruct_files


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/ddmi/furniture-image")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="pictures; their central square is used")
    parser.add_argument("--resolution", type=int, help="pixels a side (default: the run's base resolution)")
    parser.add_argument("--out", type=Path, help="folder (default: reconstructions in RUN, or here if it is read-only)")
    given = parser.parse_args()
    print(*reconstruct_files(load(given.run), given.files, given.out, resolution=given.resolution), sep="\n")


if __name__ == "__main__":
    main()
