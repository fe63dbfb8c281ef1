"""Sweep the length of CHINR's binary conditions: how much they leave to chance, and what samples are worth.

python jobs/tune_hcdm.py                                     # six lengths on bundled pictures, a local Ray
python jobs/tune_hcdm.py --seeds 3 --name condition-bits-3
ray job submit -- python jobs/tune_hcdm.py --scale.num-workers 4        # on a running cluster

All trials use one autoencoder and its latents, made first. The report holds the paper's table 2 beside ours. The same
command again goes on with an interrupted sweep; any field of the experiment is a flag too.
"""

import sys

from distributed_inr.config import command
from distributed_inr.sweeps.study import CONDITION_BITS
from distributed_inr.sweeps.sweep import main as sweep


@command
def main() -> None:
    print(sweep(sys.argv[1:], CONDITION_BITS, description=__doc__ or ""))


if __name__ == "__main__":
    main()
