"""Print what a run will need of memory, disk and network, and refuse what cannot work, before it is launched.

python jobs/plan.py ddmi/celebahq-256 --scale.num-workers 16 --scale.zero-stage 2 --memory-gib 80
python jobs/plan.py chinr/celebahq-64 --scale.num-workers 8 --samples 28000 --shards 56      # the data are elsewhere
python jobs/plan.py furniture-all --device cpu

The preset is <family>/<name>, or the name alone where one family has it; further options are those of the training
jobs, and:

  --memory-gib GIB         of a GPU: refuse what does not fit, and say what would
  --device cuda|cpu        what trains (default: cuda)
  --workers-per-node N     (default: 8)
  --samples N, --shards N  of the training set, where it is not at hand
"""

import argparse
import sys

from distributed_inr.config import Parser, command, parse
from distributed_inr.plan import plan, presets, refuse_ambiguous


@command
def main() -> None:
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--workers-per-node", type=int)
    parser.add_argument("--samples", type=int, dest="num_samples")
    parser.add_argument("--shards", type=int, dest="num_shards")
    options, argv = parser.parse_known_args(sys.argv[1:])
    refuse_ambiguous(argv[0] if argv else "")
    experiment = parse(argv, presets(), default="ddmi/furniture-image", description=__doc__ or "")
    print(plan(experiment, **vars(options)))


if __name__ == "__main__":
    main()
