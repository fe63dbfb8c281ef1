"""Copy a finished run as small as it can be shared: its options, its weights in half precision, report and pictures.

python jobs/export.py runs/ddmi/furniture-image --out furniture-image
"""

import argparse
from pathlib import Path

from distributed_inr.config import Parser, command
from distributed_inr.files import export


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/ddmi/furniture-image")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    given = parser.parse_args()
    export(given.run, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
