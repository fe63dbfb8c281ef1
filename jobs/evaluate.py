"""Measure a finished run on held-out data: evaluation.json, pictures and report.md.

python jobs/evaluate.py runs/ddmi/furniture-image
"""

import argparse
from pathlib import Path

from distributed_inr.config import Parser, command
from distributed_inr.evaluation import evaluate


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/ddmi/furniture-image")
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN)")
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands in the run's pipe: data addresses")
    given = parser.parse_args()
    evaluate(given.run, out=given.out, allow_pipe=given.allow_pipe)
    print(Path(given.out or given.run) / "report.md")


if __name__ == "__main__":
    main()
