"""Sweep the number of experts of CHINR's layers: held-out PSNR against parameters and time.

python jobs/tune_loe.py                                      # five numbers on bundled pictures, a local Ray
python jobs/tune_loe.py --scheduler asha --name experts-asha # stop those that lag behind
ray job submit -- python jobs/tune_loe.py --scale.num-workers 4         # on a running cluster

A trial trains the autoencoder alone and is judged by the PSNR of held-out signals. The same command again goes on with
an interrupted sweep; any field of the experiment is a flag too.
"""

import sys

from distributed_inr.config import command
from distributed_inr.sweeps.study import NUM_EXPERTS
from distributed_inr.sweeps.sweep import main as sweep


@command
def main() -> None:
    print(sweep(sys.argv[1:], NUM_EXPERTS, description=__doc__ or ""))


if __name__ == "__main__":
    main()
