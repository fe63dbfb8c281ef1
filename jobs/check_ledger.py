"""Prove from its sample ledger that a finished run saw every position once, through all kills and resizes.

python jobs/train_ddmi.py --name audited --autoencoder-training.ledger true --prior-training.ledger true
python jobs/check_ledger.py runs/ddmi/audited
"""

import argparse
from pathlib import Path

from distributed_inr import pipeline
from distributed_inr.config import Parser, command


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    problems = []
    for stage, account in pipeline.check_ledgers(parser.parse_args().run).items():
        print(f"{stage:12} {account}")
        problems += [f"{stage}: {problem}" for problem in account.problems]
    if problems:
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    main()
